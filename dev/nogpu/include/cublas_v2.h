// The toolkit's own declarations, with nogpu's bodies for the functions that it has.
#include_next <cublas_v2.h>
#include "nogpu_cublas.h"
