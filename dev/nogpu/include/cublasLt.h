// The toolkit's own declarations, with nogpu's bodies for the functions that it has.
#include_next <cublasLt.h>
#include "nogpu_cublaslt.h"
