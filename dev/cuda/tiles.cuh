// tiles.cuh: what the tensor-core kernels of the compressed linear layer share, in bf16: tiles of
// 64 x 64 in shared memory, read from the corner of a matrix, or drawn as a corner of P. Blocks of
// 128 threads, a warp 16 rows.

enum { SIDE = 64 };

struct Draw {  // P (n, r), to be drawn: normals times scale
    int n, r;
    float scale;
    uint64_t seed, stream;
};

// Elements (k, j) to (k, j + 3), j and r multiples of 4: a block of Philox. Zeros outside P.
__device__ inline float4 draw_quad(const Draw& p, int k, int j) {
    if (k >= p.n || j >= p.r) return {0, 0, 0, 0};
    curandStatePhilox4_32_10_t state;
    curand_init(p.seed, p.stream, int64_t(k) * p.r + j, &state);
    float4 x = curand_normal4(&state);
    return {p.scale * x.x, p.scale * x.y, p.scale * x.z, p.scale * x.w};
}

#ifndef PRECISION_FP32
// A row is 8 chunks of 16 bytes, chunk c of row i at place c ^ (i % 8): the 8 rows that one
// ldmatrix reads lie in different banks.
struct Tile {
    __nv_bfloat16 x[SIDE * SIDE];
};

__device__ inline __nv_bfloat16* chunk_of(Tile& tile, int row, int chunk) {
    return tile.x + row * SIDE + (chunk ^ (row & 7)) * 8;
}

// Rows row..row+15 of a tile as the mma's left operand: a[k] holds columns 16k..16k+15.
__device__ inline void load_rows(uint32_t a[4][4], Tile& tile, int row) {
    int lane = threadIdx.x % WARP;
    for (int k = 0; k < 4; k++)
        ldmatrix_x4(a[k], chunk_of(tile, row + lane % 16, 2 * k + lane / 16));
}

// Row and column, within a warp's 16 x 64, of element i of its sums [j].
__device__ inline int row_of(int i) { return threadIdx.x % WARP / 4 + i / 2 * 8; }
__device__ inline int column_of(int j, int i) { return 8 * j + threadIdx.x % 4 * 2 + i % 2; }

// From the element `from` on; zeros from row `rows` and column `columns` on. ld and columns:
// multiples of 8.
__device__ inline void load_corner(Tile& tile, const floatX* from, size_t ld, int rows,
                                   int columns) {
    for (int i = threadIdx.x; i < SIDE * 8; i += FLASH_THREADS) {
        int row = i / 8, chunk = i % 8;
        bool valid = row < rows && chunk * 8 < columns;
        cp_async_16_zfill(chunk_of(tile, row, chunk), valid ? from + row * ld + chunk * 8 : from,
                          valid);
    }
}

// P from its element (k, j) on: 8 blocks of Philox a thread.
__device__ inline void draw_corner(Tile& tile, const Draw& p, int k, int j) {
    for (int i = threadIdx.x; i < SIDE * 16; i += FLASH_THREADS) {
        int row = i / 16, column = i % 16 * QUAD;
        store_quad(chunk_of(tile, row, column / 8) + column % 8, draw_quad(p, k + row, j + column));
    }
}
#endif
