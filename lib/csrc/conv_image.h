// One image at a time: what the convolutional residual layers do to an image of shape (H, W, C), whose C channels
// fill one or more vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vector.h"

namespace conv {

using Vec = Vector<float>;
constexpr int LANE = LANES<float>;
constexpr int C = 16;  // channels
static_assert(C % LANE == 0, "whole vectors hold a pixel");

struct Size {
    int64_t height, width;
    int64_t pixels() const { return height * width; }
};

// ---- Convolutions, 3x3 with padding 1 ----
//
// Weights are (3 tap rows, 3 tap columns, C in, C out). Nothing is padded: the products with the border's zeros
// are left out. An input pixel's channel, spread over a vector, serves all the output pixels that it reaches.

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE __attribute__((always_inline)) inline

// Adds what one input row gives to a tile of ROWS x COLUMNS output pixels: w[r], the three taps by which it reaches
// output row r, is null where it does not. `left` and `right`: the row has a pixel on that side of the tile.
template <int ROWS, int COLUMNS, bool FIRST, bool LAST>
INLINE void add_input_row(const float* in, bool left, bool right, const float* const* w, Vec (&sum)[ROWS][COLUMNS]) {
    for (int c = 0; c < C; c++) {
        Vec weight[ROWS][3];
        UNROLL for (int r = 0; r < ROWS; r++) {
            if (!(r == 0 ? FIRST : LAST)) continue;
            UNROLL for (int tap = 0; tap < 3; tap++) weight[r][tap] = load(w[r] + (tap * C + c) * C);
        }
        UNROLL for (int i = -1; i <= COLUMNS; i++) {
            if ((i < 0 && !left) || (i == COLUMNS && !right)) continue;
            const float pixel = in[i * C + c];
            UNROLL for (int r = 0; r < ROWS; r++) {
                if (!(r == 0 ? FIRST : LAST)) continue;
                UNROLL for (int tap = 0; tap < 3; tap++)
                    if (const int out = i + 1 - tap; out >= 0 && out < COLUMNS) sum[r][out] += pixel * weight[r][tap];
            }
        }
    }
}

// Output rows [row, row + ROWS), columns [column, column + COLUMNS), one vector of output channels.
template <int ROWS, int COLUMNS>
INLINE void convolve_tile(const float* in, Size size, int64_t row, int64_t column, const float* w, Vec bias, float* out) {
    static_assert(ROWS <= 2);
    constexpr int TAPS = 3 * C * C;  // floats of a tap row
    const bool left = column > 0, right = column + COLUMNS < size.width;
    const int64_t stride = size.width * C;
    in += row * stride + column * C;
    Vec sum[ROWS][COLUMNS];
    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int i = 0; i < COLUMNS; i++) sum[r][i] = bias;
    // Input row `row + y` reaches output row `row + r` by tap row y - r + 1.
    if (row > 0) {
        const float* taps[ROWS] = {w};
        add_input_row<ROWS, COLUMNS, true, false>(in - stride, left, right, taps, sum);
    }
    if constexpr (ROWS == 1) {
        const float *middle[] = {w + TAPS}, *last[] = {w + 2 * TAPS};
        add_input_row<ROWS, COLUMNS, true, true>(in, left, right, middle, sum);
        if (row + 1 < size.height) add_input_row<ROWS, COLUMNS, true, true>(in + stride, left, right, last, sum);
    } else {
        const float *upper[] = {w + TAPS, w}, *lower[] = {w + 2 * TAPS, w + TAPS}, *last[] = {nullptr, w + 2 * TAPS};
        add_input_row<ROWS, COLUMNS, true, true>(in, left, right, upper, sum);
        add_input_row<ROWS, COLUMNS, true, true>(in + stride, left, right, lower, sum);
        if (row + 2 < size.height) add_input_row<ROWS, COLUMNS, false, true>(in + 2 * stride, left, right, last, sum);
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int i = 0; i < COLUMNS; i++) store(out + (row + r) * stride + (column + i) * C, sum[r][i]);
}

// Fetches rows [first, last) of an image that is needed soon into the cache, while the processor computes.
inline void fetch_ahead(const float* image, Size size, int64_t first, int64_t last) {
    if (!image) return;
    for (int64_t p = first * size.width * C; p < last * size.width * C; p += 16) __builtin_prefetch(image + p, 0, 2);
}

template <int ROWS, int COLUMNS>
void convolve_rows(const float* in, Size size, int64_t row, int64_t column, const float* w, const float* bias, float* out) {
    for (; column + COLUMNS <= size.width; column += COLUMNS)
        for (int first = 0; first < C; first += LANE)
            convolve_tile<ROWS, COLUMNS>(in, size, row, column, w + first, bias ? load(bias + first) : Vec{}, out + first);
    if constexpr (COLUMNS > 1)
        if (column < size.width)
            convolve_rows<ROWS, COLUMNS == 10 ? 8 : COLUMNS / 2>(in, size, row, column, w, bias, out);
}

// out = bias + conv(in). `ahead`: an image to fetch meanwhile, or null.
inline void convolve(const float* in, Size size, const float* w, const float* bias, float* out, const float* ahead = nullptr) {
    constexpr int ROWS = REGISTERS == 32 ? 2 : 1, COLUMNS = 10;  // the widest tile that leaves room for the weights
    int64_t row = 0;
    for (; row + ROWS <= size.height; row += ROWS) {
        fetch_ahead(ahead, size, row, row + ROWS);
        convolve_rows<ROWS, COLUMNS>(in, size, row, 0, w, bias, out);
    }
    for (; row < size.height; row++) convolve_rows<1, COLUMNS>(in, size, row, 0, w, bias, out);
}

// dw += in (x) dout: the gradient of the weights, three taps of a row and INPUTS input channels at a time.
inline void accumulate_weight_gradient(const float* in, Size size, const float* dout, float* dw, const float* ahead = nullptr) {
    constexpr int INPUTS = REGISTERS == 32 ? 8 : 4;
    const int64_t stride = size.width * C, last = size.width - 1;
    for (int tap_row = 0; tap_row < 3; tap_row++) {
        fetch_ahead(ahead, size, tap_row * size.height / 3, (tap_row + 1) * size.height / 3);
        for (int input = 0; input < C; input += INPUTS)
            for (int first = 0; first < C; first += LANE) {
                float* w = dw + (tap_row * 3 * C + input) * C + first;
                Vec sum[3][INPUTS];
                UNROLL for (int tap = 0; tap < 3; tap++)
                    UNROLL for (int c = 0; c < INPUTS; c++) sum[tap][c] = load(w + (tap * C + c) * C);
                for (int64_t row = std::max(0, 1 - tap_row); row < std::min(size.height, size.height + 1 - tap_row); row++) {
                    const float *x = in + (row + tap_row - 1) * stride + input, *d = dout + row * stride + first;
                    const auto add = [&](int64_t i, bool left, bool right) __attribute__((always_inline)) {  // input pixel i
                        const Vec middle = load(d + i * C);
                        const Vec before = left ? load(d + (i - 1) * C) : middle, after = right ? load(d + (i + 1) * C) : middle;
                        UNROLL for (int c = 0; c < INPUTS; c++) {
                            const float pixel = x[i * C + c];
                            if (right) sum[0][c] += pixel * after;
                            sum[1][c] += pixel * middle;
                            if (left) sum[2][c] += pixel * before;
                        }
                    };
                    if (last > 0) {
                        add(0, false, true);
                        for (int64_t i = 1; i < last; i++) add(i, true, true);
                        add(last, true, false);
                    } else {
                        add(0, false, false);
                    }
                }
                UNROLL for (int tap = 0; tap < 3; tap++)
                    UNROLL for (int c = 0; c < INPUTS; c++) store(w + (tap * C + c) * C, sum[tap][c]);
            }
    }
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
