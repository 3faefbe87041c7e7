// The toolkit's own header. One of the generators in it declares threadIdx and blockDim for host
// compilers, in a way that would clash with nogpu's; it is given other names.
#define threadIdx nogpu_curand_threadIdx
#define blockDim nogpu_curand_blockDim
#include_next <curand_kernel.h>
#undef threadIdx
#undef blockDim
