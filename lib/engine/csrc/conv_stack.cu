// The residual layers of the convolutional network on a CUDA GPU, for R runs at once, forward and backward:
//
//     h_{k+1} = h_k + (1/L) bn2(conv2(s(bn1(conv1(h_k))))),   k = 0..L-1,   16 channels, 10x10 pixels.
//
// One launch goes through all layers. A run is held by a cluster of blocks, each with a few of its images: their states
// stay in registers and shared memory from layer to layer, and only the sums that batch norm needs cross between
// blocks. Convolutions are products on the tensor cores in three passes of half precision: a = hi + lo and b = hi + lo
// hold 22 bits, a b = lo hi + hi lo + hi hi is summed in float32, and powers of two keep all of it in range; the error is
// that of float32. Sums run in a fixed order: the same bits every time.
//
// Names: x = h_k, z1 = conv1(x) without its bias (which batch norm takes out again), y1 = bn1(z1), a = s(y1),
// z2 = conv2(a); g = dl/dh. Compiled at run time (lib/cifar/stacked/layers.py) with BLOCKS, those of a run, IMAGES, the most a
// block holds, WARPS, a multiple of 3, and UPDATE_BLOCKS, those of an update. With ON_CPU defined it is C++ for tests:
// cuda_on_cpu.h plays the threads.
#ifdef ON_CPU
#include "cuda_on_cpu.h"
#else
#define KERNEL extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
#define CLUSTER_KERNEL extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(32 * WARPS, 1)
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define KEEP_ROLLED _Pragma("unroll 1")

// Two floats as half precision in one register, the first in the lower half, and back.
DEVICE unsigned to_halves(float first, float second) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
DEVICE float2 to_floats(unsigned pair) {
    float2 v;
    asm("{.reg .f16 a, b;\n\tmov.b32 {a, b}, %2;\n\tcvt.f32.f16 %0, a;\n\tcvt.f32.f16 %1, b;}"
        : "=f"(v.x), "=f"(v.y) : "r"(pair));
    return v;
}
// A warp reads four 8x8 blocks of half precision. The rows of block i lie at the addresses that lanes 8 i to 8 i + 7
// give; lane l gets columns 2 (l % 4) and the next of row l / 4, from the blocks as they are or transposed.
DEVICE void load_matrices(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
DEVICE void load_transposed(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// c (16x8) += a (16x16) b (16x8)
DEVICE void multiply_add(float* c, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }
// Into the shared memory of another block of the cluster, at the place where *p is in this one's.
DEVICE void send(double* p, int block, double value) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(block));
    asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(there), "d"(value) : "memory");
}
// All threads of a cluster meet in two halves; what was sent before the first is there after the second.
DEVICE void arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEVICE float* dynamic_shared() {
    extern __shared__ float4 memory[];
    return reinterpret_cast<float*>(memory);
}
#endif

constexpr int C = 16, SIDE = 10, PIXELS = 100, TAPS = 9, WEIGHTS = C * C * TAPS;
constexpr int THREADS = 32 * WARPS;
// A tile is 16 pixels of a block's images in a row; tile t belongs to warp t % WARPS.
constexpr int TILES = (IMAGES * PIXELS + 16 * WARPS - 1) / (16 * WARPS);
// Images lie in shared memory with zeros around them: lines of 11 pixels, whose first is the border on the left and
// that of the line before on the right; one line of zeros between images. A pixel takes 16 halves hi, 16 lo and 8 more,
// so that eight in a row start in different banks.
constexpr int LINE = SIDE + 1, PLACES = (IMAGES * LINE + 1) * LINE + 1;
constexpr int PIXEL_BYTES = 80, LO_BYTES = 32, PIXEL_WORDS = PIXEL_BYTES / 4;
constexpr int GROUPS = 3, PARTS = WARPS / GROUPS;  // of the taps and of the pixels, in the gradient of the weights
constexpr int ROW = C + 4;  // of a gradient in shared memory, so that rows start in different banks
constexpr int ENTRIES = TAPS * 64, ROUNDS = (ENTRIES + THREADS - 1) / THREADS;  // of the weights, and in how many rounds
constexpr int SUMS = 33;  // numbers that blocks exchange
// Powers of two by which what is split is multiplied: states and activations, and weights. Beyond 8188 and 255 they
// would overflow, to a loss that is not finite. Gradients have a factor of their own in each layer (Block::factor).
constexpr float STATE_FACTOR = 8.0f, WEIGHT_FACTOR = 256.0f;
constexpr int KEPT = TILES * 2 * THREADS;  // float4s that a block keeps of x, z1 or z2

struct Stack {
    const float *input, *above;  // h_0 and dl/dh_L: (R, n, 100, 16)
    float *output, *below;       // h_L and dl/dh_0
    const uint4* weight;       // (R, L, 2 convolutions, 2 directions, ENTRIES), see prepare_weights
    const float* bias[2];      // (R, L, 16)
    const float *gamma[2], *beta[2];
    float *running_mean[2], *running_var[2];
    float4* kept;              // (R, L, 3, BLOCKS, KEPT): x, z1, z2 in the order in which the threads hold them
    float* statistics;         // (R, L, 2, 2, 16): mean and 1 / standard deviation of both batch norms
    const int* activation;     // (R): 0 GELU, 1 ReLU, 3 identity
    float* weight_gradient;    // (R, L, 2, BLOCKS, 9, 16, 16): a term a block, as (tap, out, in)
    float *gamma_gradient[2], *beta_gradient[2];  // (R, L, 16)
    int depth, images;                            // images: n, of one run, a multiple of BLOCKS
    float eps, momentum;
};

struct Shared {
    unsigned g[PLACES * PIXEL_WORDS];
    uint4 weight[ENTRIES];
    double sums[WARPS][32], received[2][BLOCKS][SUMS];
    float squares[WARPS];
    unsigned short place[TILES * WARPS * 16];
    // The backward pass alone:
    alignas(16) unsigned x[PLACES * PIXEL_WORDS];
    float gradient[2][TAPS * C * ROW];
};

DEVICE void split(float first, float second, unsigned& hi, unsigned& lo) {
    hi = to_halves(first, second);
    const float2 found = to_floats(hi);
    lo = to_halves(first - found.x, second - found.y);
}

DEVICE void activate(int activation, float y, float& a, float& slope) {
    if (activation == 0) {
        const float phi = 0.5f * (1.0f + erff(y * 0.70710678118654752f));
        a = y * phi;
        slope = phi + y * 0.39894228040143268f * expf(-0.5f * y * y);
    } else if (activation == 1) {
        a = fmaxf(y, 0.0f);
        slope = y > 0.0f ? 1.0f : 0.0f;
    } else {
        a = y;
        slope = 1.0f;
    }
}

// What a thread holds of a state: tile j, columns 8 n + 2 (lane % 4) + {0, 1} of rows lane / 4 and lane / 4 + 8.
// v[j][4 n + i]: i = 0, 1 in the first row, 2, 3 in the second. Four channels, numbered 2 n + i % 2.
using Values = float[TILES][8];
#define IN_TILE(j, n, i) \
    UNROLL for (int i = 0; i < 4; ++i) if (self.row(j, i) < self.rows) UNROLL for (int n = 0; n < 2; ++n)
#define EACH_VALUE(j, n, i) UNROLL for (int j = 0; j < TILES; ++j) IN_TILE(j, n, i)

struct Block {
    const Stack& q;
    Shared& shared;
    int thread, lane, warp, run, block, rows;
    unsigned meetings = 0;
    double each_pixel;  // 1 / (n 100): sums become means

    DEVICE Block(const Stack& stack, Shared& memory) : q(stack), shared(memory) {
        thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
        run = blockIdx.x / BLOCKS, block = blockIdx.x % BLOCKS;
        rows = q.images / BLOCKS * PIXELS;
        each_pixel = 1.0 / (static_cast<double>(q.images) * PIXELS);
    }

    DEVICE int row(int tile, int i) const { return (tile * WARPS + warp) * 16 + lane / 4 + (i >= 2 ? 8 : 0); }
    DEVICE int channel(int c) const { return 8 * (c / 2) + 2 * (lane % 4) + c % 2; }
    DEVICE long long layer(int k) const { return static_cast<long long>(run) * q.depth + k; }
    DEVICE bool full() const { return (TILES - 1) * WARPS + warp < (rows + 15) / 16; }

    DEVICE void four(const float* vector, int k, float (&v)[4]) const {
        UNROLL for (int c = 0; c < 4; ++c) v[c] = vector[layer(k) * C + channel(c)];
    }

    // Zeros in all borders, and where each pixel is. Rows beyond the images are a border, with borders around.
    DEVICE void prepare(bool backward) {
        for (int i = thread; i < PLACES * PIXEL_WORDS; i += THREADS) {
            shared.g[i] = 0;
            if (backward) shared.x[i] = 0;
        }
        for (int r = thread; r < TILES * WARPS * 16; r += THREADS) {
            const int image = r / PIXELS, pixel = r % PIXELS;
            const int line = image * LINE + 1 + pixel / SIDE;
            shared.place[r] = static_cast<unsigned short>(r < rows ? line * LINE + 1 + pixel % SIDE : 2 * LINE);
        }
        arrive();  // and no block sends to one that has not begun
        wait();
    }

    // --- Between registers, shared and global memory ---

    DEVICE void read_rows(const float* from, Values& v) const {
        const Block& self = *this;
        const float* own = from + (static_cast<long long>(run) * q.images * PIXELS + static_cast<long long>(block) * rows) * C;
        UNROLL for (int j = 0; j < TILES; ++j) UNROLL for (int i = 0; i < 8; ++i) v[j][i] = 0.0f;
        EACH_VALUE(j, n, i) v[j][4 * n + i] = own[row(j, i) * C + channel(2 * n + i % 2)];
    }

    DEVICE void write_rows(float* to, const Values& v) const {
        const Block& self = *this;
        float* own = to + (static_cast<long long>(run) * q.images * PIXELS + static_cast<long long>(block) * rows) * C;
        EACH_VALUE(j, n, i) own[row(j, i) * C + channel(2 * n + i % 2)] = v[j][4 * n + i];
    }

    DEVICE float4* kept(int k, int which) const { return q.kept + ((layer(k) * 3 + which) * BLOCKS + block) * KEPT; }

    DEVICE void keep(int k, int which, const Values& v) const {
        float4* own = kept(k, which) + thread;
        UNROLL for (int j = 0; j < TILES; ++j)
            if ((j * WARPS + warp) * 16 < rows) UNROLL for (int n = 0; n < 2; ++n)
                own[(2 * j + n) * THREADS] = make_float4(v[j][4 * n], v[j][4 * n + 1], v[j][4 * n + 2], v[j][4 * n + 3]);
    }

    DEVICE void fetch(int k, int which, int j, float (&v)[8]) const {
        const float4* own = kept(k, which) + thread;
        UNROLL for (int n = 0; n < 2; ++n) {
            const bool there = (j * WARPS + warp) * 16 < rows;
            const float4 four = there ? own[(2 * j + n) * THREADS] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            v[4 * n] = four.x, v[4 * n + 1] = four.y, v[4 * n + 2] = four.z, v[4 * n + 3] = four.w;
        }
    }

    DEVICE void fetch_ahead(int k, int which) const {
        const char* own = reinterpret_cast<const char*>(kept(k, which));
        for (int line = thread; line < KEPT * 16 / 128; line += THREADS) prefetch(own + line * 128);
    }

    DEVICE void place_rows(unsigned* to, const Values& v, float factor) const {
        UNROLL for (int j = 0; j < TILES; ++j) place_tile(to, j, v[j], factor);
    }

    DEVICE void place_tile(unsigned* to, int j, const float (&v)[8], float factor) const {
        UNROLL for (int i = 0; i < 4; i += 2)
            if (row(j, i) < rows) {
                unsigned* pixel = to + shared.place[row(j, i)] * PIXEL_WORDS + lane % 4;
                UNROLL for (int n = 0; n < 2; ++n)
                    split(v[4 * n + i] * factor, v[4 * n + i + 1] * factor, pixel[4 * n], pixel[4 * n + LO_BYTES / 4]);
            }
    }

    // The weights of convolution c of layer k, by way of registers; `back`: for the gradient of the input.
    DEVICE const uint4* weights(int k, int c, bool back) const { return q.weight + ((layer(k) * 2 + c) * 2 + back) * ENTRIES; }

    DEVICE void fetch_weights(int k, int c, bool back, uint4 (&found)[ROUNDS]) const {
        const uint4* from = weights(k, c, back);
        UNROLL for (int round = 0; round < ROUNDS; ++round) {
            const int e = thread + round * THREADS;
            if (e < ENTRIES) found[round] = from[e];
        }
    }

    DEVICE void place_weights(const uint4 (&found)[ROUNDS]) {
        UNROLL for (int round = 0; round < ROUNDS; ++round) {
            const int e = thread + round * THREADS;
            if (e < ENTRIES) shared.weight[e] = found[round];
        }
    }

    DEVICE void weights_ahead(int k, int c, bool back) const {
        if (thread < ENTRIES / 8) prefetch(weights(k, c, back) + thread * 8);
    }

    // --- Convolutions ---

    // v = `factor` times the convolution of what lies at `from` with the loaded weights.
    DEVICE void convolve(const unsigned* from, Values& v, float factor) const {
        UNROLL for (int j = 0; j < TILES; ++j) UNROLL for (int i = 0; i < 8; ++i) v[j][i] = 0.0f;
        if (TILES == 1 || full())
            convolve_tiles<TILES>(from, v);
        else
            convolve_tiles<(TILES > 1 ? TILES - 1 : 1)>(from, v);
        UNROLL for (int j = 0; j < TILES; ++j) UNROLL for (int i = 0; i < 8; ++i) v[j][i] *= factor;
    }

    template <int COUNT>
    DEVICE void convolve_tiles(const unsigned* from, Values& v) const {
        unsigned address[COUNT];
        UNROLL for (int j = 0; j < COUNT; ++j)
            address[j] = shared_address(from) + (shared.place[(j * WARPS + warp) * 16 + lane % 16] - LINE) * PIXEL_BYTES +
                         lane / 16 * 16;
        KEEP_ROLLED for (int line = 0; line < 3; ++line) {
            UNROLL for (int column = 0; column < 3; ++column) {
                const uint4 b[2] = {shared.weight[(line * 3 + column) * 64 + lane],
                                    shared.weight[(line * 3 + column) * 64 + 32 + lane]};
                const int offset = (column - 1) * PIXEL_BYTES;
                // Tiles in pairs, so that a product need not wait for the one before it.
                UNROLL for (int pair = 0; pair < COUNT; pair += 2) {
                    unsigned hi[2][4], lo[2][4];
                    UNROLL for (int j = pair; j < pair + 2; ++j) if (j < COUNT) {
                        load_matrices(lo[j - pair], address[j] + offset + LO_BYTES);
                        load_matrices(hi[j - pair], address[j] + offset);
                    }
                    UNROLL for (int pass = 0; pass < 3; ++pass)
                        UNROLL for (int j = pair; j < pair + 2; ++j) if (j < COUNT) UNROLL for (int n = 0; n < 2; ++n)
                            multiply_add(v[j] + 4 * n, pass == 0 ? lo[j - pair] : hi[j - pair], pass == 1 ? b[n].z : b[n].x,
                                         pass == 1 ? b[n].w : b[n].y);
                }
            }
            UNROLL for (int j = 0; j < COUNT; ++j) address[j] += LINE * PIXEL_BYTES;
        }
    }

    // The block's term of dl/dw of convolution c of layer k: the sum over its pixels of g, shifted by each tap, times x.
    // A warp has a part of the pixels and three taps in a row. `factor` takes out those of what lies at g and x.
    DEVICE void weight_gradient(int k, int c, float factor) {
        const int part = warp / GROUPS, group = warp % GROUPS;
        float sum[3][2][4] = {};
        const unsigned step = (group - 1) * LINE * PIXEL_BYTES, block_of_lane = lane / 8 % 2 * 16;
        const unsigned g = shared_address(shared.g) + block_of_lane, x = shared_address(shared.x) + block_of_lane + step;
        const int steps = (rows + 15) / 16, last = (part + 1) * steps / PARTS;
        KEEP_ROLLED for (int sixteen = part * steps / PARTS; sixteen < last; ++sixteen) {
            const unsigned place = shared.place[sixteen * 16 + lane % 8 + lane / 16 * 8] * PIXEL_BYTES;
            unsigned hi[4], lo[4];
            load_transposed(hi, g + place);
            load_transposed(lo, g + place + LO_BYTES);
            UNROLL for (int column = 0; column < 3; ++column) {
                unsigned bhi[4], blo[4];
                load_transposed(bhi, x + place + (column - 1) * PIXEL_BYTES);
                load_transposed(blo, x + place + (column - 1) * PIXEL_BYTES + LO_BYTES);
                UNROLL for (int n = 0; n < 2; ++n) multiply_add(sum[column][n], lo, bhi[n], bhi[n + 2]);
                UNROLL for (int n = 0; n < 2; ++n) multiply_add(sum[column][n], hi, blo[n], blo[n + 2]);
                UNROLL for (int n = 0; n < 2; ++n) multiply_add(sum[column][n], hi, bhi[n], bhi[n + 2]);
            }
        }
        float* own = shared.gradient[part % 2];
        for (int turn = 0; turn < (PARTS + 1) / 2; ++turn) {
            if (part / 2 == turn)
                UNROLL for (int column = 0; column < 3; ++column) UNROLL for (int n = 0; n < 2; ++n)
                    UNROLL for (int i = 0; i < 4; i += 2) {
                    const int out = lane / 4 + i / 2 * 8, in = n * 8 + 2 * (lane % 4);
                    float2* to = reinterpret_cast<float2*>(own + ((group * 3 + column) * C + out) * ROW + in);
                    const float2 before = turn ? *to : make_float2(0.0f, 0.0f);
                    *to = make_float2(before.x + sum[column][n][i] * factor, before.y + sum[column][n][i + 1] * factor);
                }
            __syncthreads();
        }
        float* to = q.weight_gradient + ((layer(k) * 2 + c) * BLOCKS + block) * WEIGHTS;
        for (int i = thread; i < WEIGHTS; i += THREADS) {
            const int place = i / C * ROW + i % C;
            to[i] = PARTS > 1 ? shared.gradient[0][place] + shared.gradient[1][place] : shared.gradient[0][place];
        }
    }

    // --- Sums over all images of a run: two a channel, and one more in the backward pass ---

    // First half of a meeting: give this block's sums. All threads have passed their convolution when it returns.
    template <bool SQUARE>
    DEVICE void give(const double (&first)[4], const double (&second)[4], float square) {
        double v[8] = {first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3]};
        // Over the eight lanes with the same channels: each passes on half of what it holds, up to one sum a lane.
        UNROLL for (int left = 4; left >= 1; left /= 2) {
            const bool upper = lane & 4 * left;
            UNROLL for (int i = 0; i < left; ++i) {
                const double given = upper ? v[i] : v[i + left];
                v[i] = (upper ? v[i + left] : v[i]) + __shfl_xor_sync(0xffffffffu, given, 4 * left);
            }
        }
        const int which = lane / 4;
        shared.sums[warp][which / 4 * C + channel(which % 4)] = v[0];
        if (SQUARE) {
            UNROLL for (int step = 16; step >= 1; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
            if (lane == 0) shared.squares[warp] = square;
        }
        __syncthreads();
        ++meetings;
        // Warp w has the sums for the blocks w, w + WARPS, ...
        if (warp < BLOCKS) {
            double sum = 0, squares = 0;
            UNROLL for (int w = 0; w < WARPS; ++w) sum += shared.sums[w][lane];
            if (SQUARE) UNROLL for (int w = 0; w < WARPS; ++w) squares += shared.squares[w];
            for (int other = warp; other < BLOCKS; other += WARPS) {
                send(&shared.received[meetings % 2][block][lane], other, sum);
                if (SQUARE && lane == 0) send(&shared.received[meetings % 2][block][32], other, squares);
            }
        }
        arrive();
    }

    // Second half: wait for the other blocks. Returns the mean over all images and pixels of what belongs to the lane:
    // the first sum of channel `lane`, or the second of channel `lane - 16`.
    DEVICE double take() {
        wait();
        double sum = 0;
        UNROLL for (int other = 0; other < BLOCKS; ++other) sum += shared.received[meetings % 2][other][lane];
        return sum * each_pixel;
    }

    // The numbers of a thread's channels out of those of the lanes.
    DEVICE void pass_on(float of_lane, int first, float (&v)[4]) const {
        UNROLL for (int c = 0; c < 4; ++c) v[c] = __shfl_sync(0xffffffffu, of_lane, first + channel(c));
    }

    // The power of two that brings the root mean square of gradients, over pixels and summed over channels, to between
    // 16 and 32. No gradient is more than sqrt(pixels of the batch) times that, so that nothing overflows.
    DEVICE float factor() const {
        double squares = 0;
        UNROLL for (int other = 0; other < BLOCKS; ++other) squares += shared.received[meetings % 2][other][32];
        const unsigned bits = __float_as_uint(sqrtf(static_cast<float>(squares * each_pixel)));
        const int exponent = static_cast<int>(bits >> 23) - 127;
        return exponent < -100 || exponent > 100 ? 1.0f : __uint_as_float(static_cast<unsigned>(127 + 4 - exponent) << 23);
    }

    // The sum and the sum of squares of z, a channel. A thread's few values are summed about their mean.
    DEVICE void give_moments(const Values& z) {
        const Block& self = *this;
        float sum[4] = {}, square[4] = {};
        int count = 0;
        EACH_VALUE(j, n, i) sum[2 * n + i % 2] += z[j][4 * n + i];
        UNROLL for (int j = 0; j < TILES; ++j) UNROLL for (int i = 0; i < 4; i += 2) count += row(j, i) < rows;
        const float each = count ? 1.0f / count : 0.0f;
        EACH_VALUE(j, n, i) {
            const float apart = z[j][4 * n + i] - sum[2 * n + i % 2] * each;
            square[2 * n + i % 2] += apart * apart;
        }
        double first[4], second[4];
        UNROLL for (int c = 0; c < 4; ++c) {
            // sum (z - m)^2 = sum z^2 - 2 m S + count m^2 for any m, here the rounded mean.
            const double total = sum[c], mean = sum[c] * each;
            first[c] = total;
            second[c] = square[c] + 2 * mean * total - count * mean * mean;
        }
        give<false>(first, second, 0.0f);
    }

    // The sums of d and d zhat, a channel, and of (d gamma / standard deviation)^2, where zhat = (z - mean) / standard
    // deviation and z is what was kept as `which`.
    DEVICE void give_products(const Values& d, int k, int which, const float (&mean)[4], const float (&inverse)[4],
                              const float (&gamma)[4]) {
        const Block& self = *this;
        float sum[4] = {}, product[4] = {}, square = 0.0f;
        UNROLL for (int j = 0; j < TILES; ++j) {
            float z[8];
            fetch(k, which, j, z);
            IN_TILE(j, n, i) {
                const int c = 2 * n + i % 2;
                const float value = d[j][4 * n + i], scaled = value * (gamma[c] * inverse[c]);
                sum[c] += value;
                product[c] += value * ((z[4 * n + i] - mean[c]) * inverse[c]);
                square += scaled * scaled;
            }
        }
        double first[4], second[4];
        UNROLL for (int c = 0; c < 4; ++c) first[c] = sum[c], second[c] = product[c];
        give<true>(first, second, square);
    }

    DEVICE float* statistics(int k, int c) const { return q.statistics + (layer(k) * 2 + c) * 2 * C; }

    DEVICE void read_statistics(int k, int c, float (&mean)[4], float (&inverse)[4]) const {
        const float* own = statistics(k, c);
        UNROLL for (int i = 0; i < 4; ++i) mean[i] = own[channel(i)], inverse[i] = own[C + channel(i)];
    }
};

// Forward, in training mode: batch statistics, running statistics updated, x, z1 and z2 kept.
// In evaluation mode: running statistics, nothing kept.
template <bool TRAINING>
DEVICE void forward(const Stack& q) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    Block self(q, shared);
    const int activation = q.activation[self.run];
    const float step = 1.0f / q.depth;
    self.prepare(false);
    Values h, z;
    self.read_rows(q.input, h);
    self.place_rows(shared.g, h, STATE_FACTOR);
    uint4 weights[ROUNDS];
    self.fetch_weights(0, 0, false, weights);
    self.place_weights(weights);
    self.weights_ahead(0, 1, false);
    KEEP_ROLLED for (int half = 0; half < 2 * q.depth; ++half) {
        const int k = half / 2, c = half % 2;
        __syncthreads();
        const bool last = half + 1 == 2 * q.depth;
        if (!last) self.fetch_weights((half + 1) / 2, 1 - c, false, weights);
        if (half + 2 < 2 * q.depth) self.weights_ahead(k + 1, c, false);
        if (TRAINING && c == 0) self.keep(k, 0, h);
        self.convolve(shared.g, z, 1 / (STATE_FACTOR * WEIGHT_FACTOR));
        float mean[4], scale[4], beta[4], gamma[4];
        self.four(q.gamma[c], k, gamma);
        self.four(q.beta[c], k, beta);
        if (TRAINING) {
            self.give_moments(z);
            self.keep(k, 1 + c, z);
        } else {
            __syncthreads();
        }
        if (!last) self.place_weights(weights);
        if (TRAINING) {
            const double own = self.take(), square = __shfl_xor_sync(0xffffffffu, own, C);
            const double variance = square > own * own ? square - own * own : 0;  // in the first 16 lanes
            const float average = static_cast<float>(own), inverse = rsqrtf(static_cast<float>(variance) + q.eps);
            self.pass_on(average, 0, mean);
            self.pass_on(inverse, 0, scale);
            if (self.block == 0 && self.thread < C) {
                const long long place = self.layer(k) * C + self.thread;
                float* kept = self.statistics(k, c);
                kept[self.thread] = average, kept[C + self.thread] = inverse;
                const float count = static_cast<float>(q.images * PIXELS);
                float &running_mean = q.running_mean[c][place], &running_var = q.running_var[c][place];
                running_mean += q.momentum * (average + q.bias[c][place] - running_mean);
                running_var += q.momentum * (static_cast<float>(variance) * (count / (count - 1.0f)) - running_var);
            }
        } else {
            float bias[4], running[4];
            self.four(q.bias[c], k, bias);
            self.four(q.running_mean[c], k, running);
            UNROLL for (int i = 0; i < 4; ++i) mean[i] = running[i] - bias[i];
            self.four(q.running_var[c], k, running);
            UNROLL for (int i = 0; i < 4; ++i) scale[i] = rsqrtf(running[i] + q.eps);
        }
        UNROLL for (int i = 0; i < 4; ++i) scale[i] *= gamma[i];
        EACH_VALUE(j, n, i) {
            const int channel = 2 * n + i % 2;
            const float y = (z[j][4 * n + i] - mean[channel]) * scale[channel] + beta[channel];
            float slope;
            if (c == 0)
                activate(activation, y, z[j][4 * n + i], slope);
            else
                h[j][4 * n + i] += y * step;
        }
        if (c == 0)
            self.place_rows(shared.g, z, STATE_FACTOR);
        else
            self.place_rows(shared.g, h, STATE_FACTOR);
    }
    self.write_rows(q.output, h);
}

CLUSTER_KERNEL stack_forward(const Stack q) { forward<true>(q); }
CLUSTER_KERNEL stack_evaluate(const Stack q) { forward<false>(q); }

// Backward from dl/dh_L, after stack_forward with the same weights.
CLUSTER_KERNEL stack_backward(const Stack q) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    Block self(q, shared);
    const int activation = q.activation[self.run];
    const float step = 1.0f / q.depth;
    self.prepare(true);
    Values g, d;
    float mean[4], inverse[4], gamma[4];
    self.read_rows(q.above, g);
    uint4 weights[ROUNDS];
    self.fetch_weights(q.depth - 1, 1, true, weights);
    self.place_weights(weights);
    self.weights_ahead(q.depth - 1, 0, true);
    self.read_statistics(q.depth - 1, 1, mean, inverse);
    self.four(q.gamma[1], q.depth - 1, gamma);
    UNROLL for (int j = 0; j < TILES; ++j) UNROLL for (int i = 0; i < 8; ++i) d[j][i] = g[j][i] * step;
    self.give_products(d, q.depth - 1, 2, mean, inverse, gamma);
    // d = dl/dy of batch norm c, whose sums are on their way; mean, inverse and gamma are those of that batch norm.
    KEEP_ROLLED for (int half = 2 * q.depth - 1; half >= 0; --half) {
        const int k = half / 2, c = half % 2;
        const double own = self.take();
        if (self.block == 0 && self.thread < 32) {
            float* to = (self.thread < C ? q.beta_gradient[c] : q.gamma_gradient[c]) + self.layer(k) * C + self.thread % C;
            *to = static_cast<float>(own / self.each_pixel);
        }
        const float factor = self.factor();
        // dl/dz = gamma / std (d - mean of d - zhat mean of (d zhat))
        float sum[4], product[4];
        self.pass_on(static_cast<float>(own), 0, sum);
        self.pass_on(static_cast<float>(own), C, product);
        UNROLL for (int j = 0; j < TILES; ++j) {
            float z[8];
            self.fetch(k, 1 + c, j, z);
            IN_TILE(j, n, i) {
                const int channel = 2 * n + i % 2;
                const float zhat = (z[4 * n + i] - mean[channel]) * inverse[channel];
                d[j][4 * n + i] = gamma[channel] * inverse[channel] * (d[j][4 * n + i] - sum[channel] - zhat * product[channel]);
            }
            self.place_tile(shared.g, j, d[j], factor);
        }
        if (c == 0)
            UNROLL for (int j = 0; j < TILES; ++j) {
                float x[8];
                self.fetch(k, 0, j, x);
                self.place_tile(shared.x, j, x, STATE_FACTOR);
            }
        __syncthreads();
        // What the next half needs is on its way during the convolution.
        float beta[4];
        if (half > 0) {
            const int next = (half - 1) / 2;
            self.fetch_weights(next, 1 - c, true, weights);
            self.read_statistics(next, 1 - c, mean, inverse);
            self.four(q.gamma[1 - c], next, gamma);
            self.four(q.beta[1 - c], next, beta);
            if (c == 1)
                self.fetch_ahead(k, 0);
            else
                self.fetch_ahead(k - 1, 2), self.fetch_ahead(k - 1, 1);
            if (half > 1) self.weights_ahead((half - 2) / 2, c, true);
        }
        self.convolve(shared.g, d, 1 / (factor * WEIGHT_FACTOR));
        if (c == 1) {
            float sum[4] = {}, product[4] = {}, square = 0.0f;
            UNROLL for (int j = 0; j < TILES; ++j) {
                float z[8], a[8];
                self.fetch(k, 1, j, z);
                IN_TILE(j, n, i) {
                    const int channel = 2 * n + i % 2;
                    const float zhat = (z[4 * n + i] - mean[channel]) * inverse[channel];
                    float slope;
                    activate(activation, zhat * gamma[channel] + beta[channel], a[4 * n + i], slope);
                    const float below = d[j][4 * n + i] * slope, scaled = below * (gamma[channel] * inverse[channel]);
                    d[j][4 * n + i] = below;
                    sum[channel] += below;
                    product[channel] += below * zhat;
                    square += scaled * scaled;
                }
                self.place_tile(shared.x, j, a, STATE_FACTOR);
            }
            double first[4], second[4];
            UNROLL for (int i = 0; i < 4; ++i) first[i] = sum[i], second[i] = product[i];
            self.give<true>(first, second, square);
        } else {
            UNROLL for (int j = 0; j < TILES; ++j) UNROLL for (int i = 0; i < 8; ++i) {
                g[j][i] += d[j][i];
                d[j][i] = g[j][i] * step;
            }
            if (k > 0) self.give_products(d, k - 1, 2, mean, inverse, gamma);
        }
        if (half > 0) self.place_weights(weights);
        // While the sums are on their way. The threads of the block meet in it when all have read what lies at g and x.
        self.weight_gradient(k, c, 1 / (factor * STATE_FACTOR));
    }
    self.write_rows(q.below, g);
}

// --- The weights between launches ---

struct Update {
    float *weight[2], *momentum[2];  // (R, L, 16, 16, 3, 3)
    const float *gradient, *rate;    // (R, L, 2, BLOCKS, 9, 16, 16), see Stack; eta
    uint4* prepared;                 // (R, L, 2, 2, ENTRIES), see prepare_weights
    long long layers;                // R L
    float mu, lambda;
};

// Weights (out, in, tap) as the lanes multiply them. Entry (tap, half, lane) holds column n = 8 half + lane / 4 of the
// matrix of that tap: hi of rows 2 (lane % 4) and the next, of the two rows 8 below, then lo. The matrix is (in, out), or,
// going back, (out, in) with the taps from the other end.
DEVICE void prepare_weights(const float* weight, uint4* to) {
    for (int i = threadIdx.x; i < 2 * ENTRIES; i += THREADS) {
        const bool back = i >= ENTRIES;
        const int e = i % ENTRIES, column = e / 32 % 2 * 8 + e % 32 / 4, tap = back ? TAPS - 1 - e / 64 : e / 64;
        float v[4];
        UNROLL for (int j = 0; j < 4; ++j) {
            const int row = e % 4 * 2 + j % 2 + j / 2 * 8, out = back ? row : column, in = back ? column : row;
            v[j] = weight[(out * C + in) * TAPS + tap] * WEIGHT_FACTOR;
        }
        uint4 entry;
        split(v[0], v[1], entry.x, entry.z);
        split(v[2], v[3], entry.y, entry.w);
        to[i] = entry;
    }
}

// A step of gradient descent on the weights of the convolutions: m <- mu m + g + lambda w, w <- w - eta m, where g is the
// sum over the blocks' terms. With DESCEND false the weights are only prepared.
template <bool DESCEND>
DEVICE void update(const Update& q) {
    float *sum = dynamic_shared(), *after = sum + WEIGHTS;
    const float rate = DESCEND ? *q.rate : 0.0f;
    for (long long convolution = blockIdx.x; convolution < 2 * q.layers; convolution += UPDATE_BLOCKS) {
        const long long start = convolution / 2 * WEIGHTS;
        float *weight = q.weight[convolution % 2] + start, *momentum = q.momentum[convolution % 2] + start;
        const float* gradient = q.gradient + convolution * BLOCKS * WEIGHTS;
        if (DESCEND) {
            for (int i = threadIdx.x; i < WEIGHTS; i += THREADS) {
                float term = 0.0f;
                UNROLL for (int block = 0; block < BLOCKS; ++block) term += gradient[block * WEIGHTS + i];
                sum[i] = term;
            }
            __syncthreads();
        }
        for (int i = threadIdx.x; i < WEIGHTS; i += THREADS) {
            float w = weight[i];
            if (DESCEND) {
                const float m = q.mu * momentum[i] + (sum[(i % TAPS * C + i / (C * TAPS)) * C + i / TAPS % C] + q.lambda * w);
                momentum[i] = m;
                weight[i] = w -= rate * m;
            }
            after[i] = w;
        }
        __syncthreads();
        prepare_weights(after, q.prepared + convolution * 2 * ENTRIES);
        __syncthreads();
    }
}

KERNEL stack_update(const Update q) { update<true>(q); }
KERNEL stack_prepare(const Update q) { update<false>(q); }
