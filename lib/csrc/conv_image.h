// One image at a time: what the convolutional residual layers do to an image of shape (H, W, C), whose C channels
// fill one or more vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "vector.h"

namespace conv {

using Vec = Vector<float>;
constexpr int LANE = LANES<float>;
constexpr int C = 16;  // channels
static_assert(C % LANE == 0, "whole vectors hold a pixel");

struct Size {
    int64_t height, width;
    int64_t pixels() const { return height * width; }
    int64_t tiles() const { return (height + 1) / 2 * ((width + 1) / 2); }  // of 2 x 2 pixels
};

// ---- Convolutions, 3x3 with padding 1 ----
//
// Winograd's F(2x2, 3x3) (Lavin & Gray 2016): the 2 x 2 output pixels y of a tile come from the 4 x 4 input pixels d
// that reach them, and the 3 x 3 weight w, by 16 products of channels with a C x C matrix instead of 36,
//
//     y = A' ((G w G') . (B' d B)) A,    dw = G' (sum over tiles of (B' d B) . (A dy A')) G,
//
//     A' = | 1  1  1  0 |    B' = | 1  0 -1  0 |    G = |  1    0    0  |
//          | 0  1 -1 -1 |         | 0  1  1  0 |        | 1/2  1/2  1/2 |
//                                 | 0 -1  1  0 |        | 1/2 -1/2  1/2 |
//                                 | 0  1  0 -1 |        |  0    0    1  |
//
// and the gradient with respect to the input is a convolution again. The places (i, j) of these products, 4 x 4, are
// called points; a weight at points is (4, 4, C in, C out). An image goes through them a row i of points at a time,
// (4 points j, tiles, C), which stays in the nearest cache.

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE __attribute__((always_inline)) inline

constexpr int WEIGHTS = 16 * C * C;

// What a thread needs to convolve images of one size. zeros: the rows above and below an image.
struct Workspace {
    Buffer<float> points, other_points, zeros;
    explicit Workspace(Size size)
        : points(4 * size.tiles() * C), other_points(4 * size.tiles() * C), zeros(size.width * C) {}
};

// G w G'.
template <class Value>
INLINE void weight_to_points(const Value (&w)[9], Value (&points)[16]) {
    Value rows[4][3];
    UNROLL for (int j = 0; j < 3; j++) {
        const Value ends = (w[j] + w[6 + j]) * 0.5f, middle = w[3 + j] * 0.5f;
        rows[0][j] = w[j], rows[1][j] = ends + middle, rows[2][j] = ends - middle, rows[3][j] = w[6 + j];
    }
    UNROLL for (int i = 0; i < 4; i++) {
        const Value ends = (rows[i][0] + rows[i][2]) * 0.5f, middle = rows[i][1] * 0.5f;
        points[4 * i] = rows[i][0], points[4 * i + 3] = rows[i][2];
        points[4 * i + 1] = ends + middle, points[4 * i + 2] = ends - middle;
    }
}

// G' points G: the way back, for a gradient.
template <class Value>
INLINE void weight_from_points(const Value (&points)[16], Value (&w)[9]) {
    Value rows[3][4];
    UNROLL for (int j = 0; j < 4; j++) {
        const Value both = (points[4 + j] + points[8 + j]) * 0.5f;
        rows[0][j] = points[j] + both, rows[2][j] = points[12 + j] + both;
        rows[1][j] = (points[4 + j] - points[8 + j]) * 0.5f;
    }
    UNROLL for (int i = 0; i < 3; i++) {
        const Value both = (rows[i][1] + rows[i][2]) * 0.5f;
        w[3 * i] = rows[i][0] + both, w[3 * i + 2] = rows[i][3] + both;
        w[3 * i + 1] = (rows[i][1] - rows[i][2]) * 0.5f;
    }
}

// A weight in PyTorch's layout, (C out, C in, 9 taps), at points.
inline void weight_at_points(const float* weight, float* points) {
    alignas(64) float outputs_last[9 * C * C];  // (C in, 9 taps, C out)
    transpose(weight, C, 9 * C, outputs_last, C);
    for (int in = 0; in < C; in++)
        for (int first = 0; first < C; first += LANE) {
            Vec taps[9], at[16];
            UNROLL for (int tap = 0; tap < 9; tap++) taps[tap] = load(outputs_last + (in * 9 + tap) * C + first);
            weight_to_points(taps, at);
            UNROLL for (int p = 0; p < 16; p++) store(points + (p * C + in) * C + first, at[p]);
        }
}

// The same for the gradient with respect to the input: input and output channels exchanged, taps in reverse, by which
// the points at either end change places.
inline void reversed_weight_at_points(const float* weight, float* points) {
    constexpr int opposite[] = {3, 1, 2, 0};
    alignas(64) float direct[WEIGHTS];
    weight_at_points(weight, direct);
    for (int p = 0; p < 16; p++)
        transpose(direct + p * C * C, C, C, points + (4 * opposite[p / 4] + opposite[p % 4]) * C * C, C);
}

// Row I of B' d B, for every tile.
template <int I>
void input_to_points(const float* in, Size size, const float* zeros, float* points) {
    constexpr int ONE = I == 0 ? 0 : I == 2 ? 2 : 1, OTHER = I == 3 ? 3 : I == 2 ? 1 : 2;  // the rows of d that B' combines
    const int64_t stride = size.width * C, point = size.tiles() * C;
    for (int first = 0; first < C; first += LANE) {
        float* out = points + first;
        for (int64_t row = 0; row < size.height; row += 2) {
            const auto input_row = [&](int64_t y) { return (y >= 0 && y < size.height ? in + y * stride : zeros) + first; };
            const float *one = input_row(row - 1 + ONE), *other = input_row(row - 1 + OTHER);
            const auto column = [&](int64_t x) __attribute__((always_inline)) {
                const Vec a = load(one + x * C), b = load(other + x * C);
                return I == 1 ? a + b : a - b;
            };
            Vec c0{}, c1 = column(0);
            for (int64_t x = 0; x < size.width; x += 2, out += C) {
                const Vec c2 = x + 1 < size.width ? column(x + 1) : Vec{}, c3 = x + 2 < size.width ? column(x + 2) : Vec{};
                store(out, c0 - c2);
                store(out + point, c1 + c2);
                store(out + 2 * point, c2 - c1);
                store(out + 3 * point, c1 - c3);
                c0 = c2, c1 = c3;
            }
        }
    }
}

// Row I of A dy A', for every tile.
template <int I>
void gradient_to_points(const float* dout, Size size, const float* zeros, float* points) {
    const int64_t stride = size.width * C, point = size.tiles() * C;
    for (int first = 0; first < C; first += LANE) {
        float* out = points + first;
        for (int64_t row = 0; row < size.height; row += 2) {
            const float* upper = dout + row * stride + first;
            const float* lower = row + 1 < size.height ? upper + stride : zeros + first;
            const auto column = [&](int64_t x) __attribute__((always_inline)) {
                if (I == 0) return load(upper + x * C);
                if (I == 3) return -load(lower + x * C);
                return I == 1 ? load(upper + x * C) + load(lower + x * C) : load(upper + x * C) - load(lower + x * C);
            };
            for (int64_t x = 0; x < size.width; x += 2, out += C) {
                const Vec c0 = column(x), c1 = x + 1 < size.width ? column(x + 1) : Vec{};
                store(out, c0);
                store(out + point, c0 + c1);
                store(out + 2 * point, c0 - c1);
                store(out + 3 * point, -c1);
            }
        }
    }
}

// Adds what row I of the points has in every tile's A' points A.
template <int I>
void add_output(const float* points, Size size, float* image) {
    const int64_t stride = size.width * C, point = size.tiles() * C;
    for (int first = 0; first < C; first += LANE) {
        const float* in = points + first;
        for (int64_t row = 0; row < size.height; row += 2)
            for (int64_t x = 0; x < size.width; x += 2, in += C) {
                const Vec m1 = load(in + point), m2 = load(in + 2 * point);
                const Vec left = load(in) + (m1 + m2), right = (m1 - m2) - load(in + 3 * point);
                const auto add = [&](float* upper, Vec y) __attribute__((always_inline)) {
                    float* lower = upper + stride;
                    if (I < 3) store(upper, I == 0 ? y : load(upper) + y);
                    if (I > 0 && row + 1 < size.height) store(lower, I == 1 ? y : load(lower) - y);
                };
                float* out = image + row * stride + x * C + first;
                add(out, left);
                if (x + 1 < size.width) add(out + C, right);
            }
    }
}

constexpr bool HELD = REGISTERS == 32 && LANE == C;  // registers hold a C x C matrix

// point = start + (channels at `point`) times w, for all tiles, TILES of them at a time.
template <int TILES>
INLINE void multiply(float* point, int64_t tiles, const float* w, const Vec (&start)[C / LANE]) {
    Vec held[C];
    if (HELD)
        UNROLL for (int c = 0; c < C; c++) held[c] = load(w + c * C);
    for (; tiles >= TILES; tiles -= TILES, point += TILES * C) {
        Vec sum[TILES][C / LANE];
        UNROLL for (int t = 0; t < TILES; t++) UNROLL for (int v = 0; v < C / LANE; v++) sum[t][v] = start[v];
        UNROLL for (int c = 0; c < C; c++)
            UNROLL for (int v = 0; v < C / LANE; v++) {
                const Vec weight = HELD ? held[c] : load(w + c * C + v * LANE);
                UNROLL for (int t = 0; t < TILES; t++) sum[t][v] += point[t * C + c] * weight;
            }
        UNROLL for (int t = 0; t < TILES; t++)
            UNROLL for (int v = 0; v < C / LANE; v++) store(point + t * C + v * LANE, sum[t][v]);
    }
    if constexpr (TILES > 1)
        if (tiles > 0) multiply<TILES / 2>(point, tiles, w, start);
}

// Does work(I) for the four rows of points.
template <class Work>
INLINE void each_row_of_points(const Work& work) {
    work(std::integral_constant<int, 0>{});
    work(std::integral_constant<int, 1>{});
    work(std::integral_constant<int, 2>{});
    work(std::integral_constant<int, 3>{});
}

// Images that will soon be read or written, or null. They are fetched into the cache while the processor computes, a few
// lines at a time: more would hold up what comes behind them.
struct Ahead {
    const float *image, *other;

    INLINE void fetch(Size size, int part) const {  // one part of 16
        const int64_t first = part * size.pixels() / 16 * C, last = (part + 1) * size.pixels() / 16 * C;
        for (const float* data : {image, other})
            if (data)
                for (int64_t p = first; p < last; p += 16) __builtin_prefetch(data + p, 0, 2);
    }
};

// out = bias + conv(in), w at points.
inline void convolve(const float* in, Size size, const float* w, const float* bias, float* out, Workspace& workspace,
                     Ahead ahead = {}) {
    constexpr int TILES = HELD ? 5 : (REGISTERS == 32 ? 24 : 12) * LANE / C;
    const int64_t point = size.tiles() * C;
    float* points[2] = {workspace.points, workspace.other_points};
    input_to_points<0>(in, size, workspace.zeros, points[0]);
    each_row_of_points([&](auto row) {
        constexpr int I = decltype(row)::value;
        for (int j = 0; j < 4; j++) {
            ahead.fetch(size, 4 * I + j);
            Vec start[C / LANE]{};
            if (I == 1 && j == 1 && bias)  // this point goes to all pixels of a tile, with weight 1
                for (int v = 0; v < C / LANE; v++) start[v] = load(bias + v * LANE);
            multiply<TILES>(points[I % 2] + j * point, size.tiles(), w + (4 * I + j) * C * C, start);
        }
        // Reading comes before writing: loads would wait for stores to addresses that look alike.
        if constexpr (I < 3) input_to_points<I + 1>(in, size, workspace.zeros, points[1 - I % 2]);
        add_output<I>(points[I % 2], size, out);
    });
}

// dw += the gradient of the weights, at points.
inline void accumulate_weight_gradient(const float* in, Size size, const float* dout, float* dw, Workspace& workspace,
                                       Ahead ahead = {}) {
    constexpr int INPUTS = REGISTERS == 32 ? 16 : 8;
    const int64_t point = size.tiles() * C;
    each_row_of_points([&](auto row) {
        constexpr int I = decltype(row)::value;
        input_to_points<I>(in, size, workspace.zeros, workspace.points);
        gradient_to_points<I>(dout, size, workspace.zeros, workspace.other_points);
        for (int j = 0; j < 4; j++) {
            ahead.fetch(size, 4 * I + j);
            for (int input = 0; input < C; input += INPUTS)
                for (int first = 0; first < C; first += LANE) {
                    const float* x = workspace.points + j * point + input;
                    const float* d = workspace.other_points + j * point + first;
                    float* w = dw + ((4 * I + j) * C + input) * C + first;
                    Vec sum[INPUTS];
                    UNROLL for (int c = 0; c < INPUTS; c++) sum[c] = load(w + c * C);
                    for (int64_t tile = 0; tile < size.tiles(); tile++) {
                        const Vec gradient = load(d + tile * C);
                        UNROLL for (int c = 0; c < INPUTS; c++) sum[c] += x[tile * C + c] * gradient;
                    }
                    UNROLL for (int c = 0; c < INPUTS; c++) store(w + c * C, sum[c]);
                }
        }
    });
}

// The sum over an image of term(offset of a pixel), in four parts: an addition has to wait for the one before.
template <class Term>
INLINE Vec sum_pixels(Size size, const Term& term) {
    const int64_t pixels = size.pixels();
    Vec part[4]{};
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4)
        UNROLL for (int i = 0; i < 4; i++) part[i] += term((p + i) * C);
    for (; p < pixels; p++) part[0] += term(p * C);
    return (part[0] + part[1]) + (part[2] + part[3]);
}

inline void add_pixels(const float* d, Size size, float* sums) {  // the bias's gradient
    for (int first = 0; first < C; first += LANE)
        store(sums + first, load(sums + first) + sum_pixels(size, [&](int64_t p) { return load(d + first + p); }));
}

// a = s(u), u = scale z + shift, and on request s'(u).
template <ActivationName NAME, bool DERIVATIVE>
void activate(const float* z, Size size, const float* scale, const float* shift, float* a, float* derivative) {
    for (int first = 0; first < C; first += LANE) {
        const Vec scale_ = load(scale + first), shift_ = load(shift + first);
        for (int64_t p = first; p < size.pixels() * C; p += C) {
            Vec slope;
            store(a + p, activation<float, NAME, DERIVATIVE>(load(z + p) * scale_ + shift_, &slope));
            if (DERIVATIVE) store(derivative + p, slope);
        }
    }
}

using Activate = void (*)(const float*, Size, const float*, const float*, float*, float*);

template <bool DERIVATIVE>
Activate activate_function(int64_t name) {
    switch (name) {
        case GELU: return activate<GELU, DERIVATIVE>;
        case RELU: return activate<RELU, DERIVATIVE>;
        case TANH: return activate<TANH, DERIVATIVE>;
        case SOFTPLUS: return activate<SOFTPLUS, DERIVATIVE>;
        case LEAKY_RELU: return activate<LEAKY_RELU, DERIVATIVE>;
        default: return activate<IDENTITY, DERIVATIVE>;
    }
}

// ---- Batch norm ----

// Mean and sum of squared deviations of each channel over one image, in two passes over the cached image.
inline void image_moments(const float* z, Size size, float* moments) {
    for (int first = 0; first < C; first += LANE) {
        const Vec mean = sum_pixels(size, [&](int64_t p) { return load(z + first + p); }) / float(size.pixels());
        const auto square = [&](int64_t p) {
            const Vec deviation = load(z + first + p) - mean;
            return deviation * deviation;
        };
        store(moments + first, mean);
        store(moments + C + first, sum_pixels(size, square));
    }
}

// Batch mean and (biased) variance from the images' moments: total deviation = within images + between them.
inline void batch_moments(const float* moments, int64_t images, Size size, float* mean, float* variance) {
    for (int c = 0; c < C; c++) {
        double sum = 0, within = 0, between = 0;
        for (int64_t i = 0; i < images; i++) {
            sum += moments[i * 2 * C + c];
            within += moments[i * 2 * C + C + c];
        }
        const double average = sum / images;
        for (int64_t i = 0; i < images; i++) {
            const double deviation = moments[i * 2 * C + c] - average;
            between += deviation * deviation;
        }
        mean[c] = average;
        variance[c] = (within + between * size.pixels()) / (double(images) * size.pixels());
    }
}

inline void batch_sums(const float* per_image, int64_t images, float factor, float* sums) {  // (images, 2C) -> (2C)
    double total[2 * C] = {};
    for (int64_t i = 0; i < images; i++)
        for (int c = 0; c < 2 * C; c++) total[c] += per_image[i * 2 * C + c];
    for (int c = 0; c < 2 * C; c++) sums[c] = float(total[c] * factor);
}

// A batch norm: z -> scale z + shift, where (z - mean) inverse is the normalised value. Absent: the identity.
struct alignas(64) Norm {
    float scale[C], shift[C], mean[C], inverse[C];

    Norm() : shift{}, mean{} {
        std::fill_n(scale, C, 1.0f);
        std::fill_n(inverse, C, 1.0f);
    }
    Norm(const float* mean_, const float* variance, const float* gamma, const float* beta, double eps) {
        for (int c = 0; c < C; c++) {
            mean[c] = mean_[c];
            inverse[c] = float(1 / std::sqrt(variance[c] + eps));
            scale[c] = gamma[c] * inverse[c];
            shift[c] = beta[c] - mean[c] * scale[c];
        }
    }

    // out = x + step (scale z + shift)
    void add_scaled(const float* x, float step, const float* z, Size size, float* out) const {
        for (int first = 0; first < C; first += LANE) {
            const Vec a = load(scale + first) * step, b = load(shift + first) * step;
            for (int64_t p = first; p < size.pixels() * C; p += C) store(out + p, load(x + p) + (load(z + p) * a + b));
        }
    }

    // Sums over one image of d and of d times the normalised z: its share of the gradients of beta and gamma.
    void sums(const float* d, const float* z, Size size, float* out) const {
        for (int first = 0; first < C; first += LANE) {
            const Vec m = load(mean + first), r = load(inverse + first);
            const auto projection = [&](int64_t p) { return load(d + first + p) * ((load(z + first + p) - m) * r); };
            store(out + first, sum_pixels(size, [&](int64_t p) { return load(d + first + p); }));
            store(out + C + first, sum_pixels(size, projection));
        }
    }

    // dz = scale (factor d - mean of d - normalised z * mean of (d normalised z)): the two means are over the batch
    // where its own statistics were used, else zero.
    void backward(const float* d, float factor, const float* z, const float* means, Size size, float* dz) const {
        for (int first = 0; first < C; first += LANE) {
            const Vec s = load(scale + first), m = load(mean + first), r = load(inverse + first);
            const Vec mean_d = load(means + first), mean_projection = load(means + C + first);
            for (int64_t p = first; p < size.pixels() * C; p += C) {
                const Vec normalised = (load(z + p) - m) * r;
                store(dz + p, s * (load(d + p) * factor - mean_d - normalised * mean_projection));
            }
        }
    }
};

}  // namespace conv
