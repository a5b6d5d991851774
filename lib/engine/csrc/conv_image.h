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

constexpr int TILE = 5;  // a convolution takes images by tiles of 5 x 5 pixels

struct Size {
    int64_t height, width;
    int64_t pixels() const { return height * width; }
    int64_t columns() const { return (width + TILE - 1) / TILE; }
    int64_t tiles() const { return (height + TILE - 1) / TILE * columns(); }
};

// ---- Convolutions, 3x3 with padding 1 ----
//
// Winograd's F(5x5, 3x3) (Lavin & Gray 2016) with i and -i among its points (Meng & Brothers 2019): the 5 x 5 output
// pixels y of a tile come from the 7 x 7 input pixels d that reach them, and the 3 x 3 weight w, by
//
//     y = A' ((G w G') . (B' d B)) A,    dw = G' (sum over tiles of (B' d B) . (A dy A')) G,
//
// and the gradient with respect to the input is a convolution again. In one dimension the points p are 0, 1, -1, 2,
// infinity, i and -i, with M(x) = x (x^4 - 1) (x - 2): A y is the polynomial y_0 + y_1 x + ... + y_4 x^4 at the points,
// G w that of w over M'(p), and B' d has as its row p the coefficients of M(x) / (x - p), as its row infinity those of
// M(x). What is real has conjugate values at i and -i: seven places hold the values at the five real points, then the
// real and the imaginary part of that at i. With real points alone, some of them further from 0 or closer to others,
// rounding errors were five times larger.
//
// In two dimensions, 7 x 7 places, 25 values are real and 12 complex. A product of complex numbers is three real ones,
//
//     (a + b i) (c + d i) = k - b (c + d) + i (k + a (d - c)),    k = (a + b) c,
//
// so that a tile takes 25 + 3 * 12 = 61 products of its channels with a C x C matrix, where the definition has 225 (and
// F(2x2, 3x3) 100). Each product has a left factor, of the input, and a right factor, of the weight or of the gradient
// at the output.

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE __attribute__((always_inline)) inline

constexpr int PLACES = 7, REAL = 5, PRODUCTS = 61, TAPS = 9 * C * C;
// From one product's matrix to the next: one line more than a matrix, since the cache has no room for 61 lines that
// are 1 KiB apart.
constexpr int MATRIX = C * C + C, WEIGHTS = PRODUCTS * MATRIX;

// The products' numbers, by the places of their values; three in a row for a complex one.
constexpr int real_product(int a, int b) { return 8 * a + b; }
constexpr int row_product(int a) { return 8 * a + REAL; }         // at (a, i)
constexpr int column_product(int b) { return 8 * REAL + 3 * b; }  // at (i, b)
constexpr int BOTH = column_product(REAL), OPPOSITE = BOTH + 3;   // at (i, i), at (i, -i)
static_assert(OPPOSITE + 3 == PRODUCTS);

INLINE void input_values(const Vec (&d)[PLACES], Vec (&v)[PLACES]) {  // B' d
    const Vec minus1 = d[3] - d[1], minus2 = d[4] - d[2], minus3 = d[5] - d[3];
    const Vec plus1 = d[3] + d[1], plus2 = d[4] + d[2], plus3 = d[5] + d[3];
    const Vec even = plus3 - plus2 * 2, odd = plus2 - plus1 * 2, fourth = d[5] - d[1];
    v[0] = fourth - (d[4] - d[0]) * 2;
    v[1] = even + odd, v[2] = even - odd, v[3] = fourth;
    v[4] = (d[6] - d[2]) - fourth * 2;
    v[5] = minus3 - minus2 * 2, v[6] = minus2 - minus1 * 2;
}

INLINE void weight_values(const Vec (&w)[3], Vec (&v)[PLACES]) {  // G w; twice that at i, which stands for -i too
    const Vec ends = w[0] + w[2], tenth = (w[0] - w[2]) * 0.1f;
    v[0] = w[0] * (1 / 2.0f), v[1] = (ends + w[1]) * (-1 / 4.0f), v[2] = (ends - w[1]) * (-1 / 12.0f);
    v[3] = (w[0] + w[1] * 2 + w[2] * 4) * (1 / 30.0f), v[4] = w[2];
    v[5] = w[1] * 0.1f - tenth * 2, v[6] = w[1] * -0.2f - tenth;
}

INLINE void weight_from_values(const Vec (&v)[PLACES], Vec (&w)[3]) {  // G' v
    const Vec one = v[1] * (-1 / 4.0f), minus_one = v[2] * (-1 / 12.0f), two = v[3] * (1 / 30.0f);
    const Vec even = one + minus_one, twist = v[5] * 0.2f + v[6] * 0.1f;
    w[0] = (v[0] * (1 / 2.0f) + even) + (two - twist);
    w[1] = (one - minus_one) + (two * 2 + (v[5] * 0.1f - v[6] * 0.2f));
    w[2] = (v[4] + even) + (two * 4 + twist);
}

INLINE void gradient_values(const Vec (&y)[TILE], Vec (&v)[PLACES]) {  // A y
    const Vec ends = y[0] + y[4], even = ends + y[2], odd = y[1] + y[3];
    v[0] = y[0], v[1] = even + odd, v[2] = even - odd, v[4] = y[4];
    v[3] = y[0] + (y[1] + (y[2] + (y[3] + y[4] * 2) * 2) * 2) * 2;
    v[5] = ends - y[2], v[6] = y[1] - y[3];
}

INLINE void output_from_values(const Vec (&v)[PLACES], Vec (&y)[TILE]) {  // A' v
    const Vec even = v[1] + v[2], odd = v[1] - v[2], both = even + v[5];
    y[0] = (v[0] + v[3]) + both;
    y[1] = (odd - v[6]) + v[3] * 2;
    y[2] = (even - v[5]) + v[3] * 4;
    y[3] = (odd + v[6]) + v[3] * 8;
    y[4] = (both + v[4]) + v[3] * 16;
}

// Where a tile's or a weight's factors go: left or right ones, each `stride` after the one before.
template <bool LEFT>
struct Factors {
    float* to;
    int64_t stride;

    INLINE void real(int q, Vec value) const { store(to + q * stride, value); }
    INLINE void complex(int q, Vec re, Vec im) const {
        real(q, LEFT ? re + im : re);
        real(q + 1, LEFT ? im : -(re + im));
        real(q + 2, LEFT ? re : im - re);
    }

    // All of them. row(a, v) says what the transform along the columns has in row a; `scale` goes to (i, i), (i, -i).
    template <class Row>
    INLINE void all(const Row& row, float scale = 1) const {
        Vec v[PLACES], w[PLACES];
        for (int a = 0; a < REAL; a++) {
            row(a, v);
            UNROLL for (int b = 0; b < REAL; b++) real(real_product(a, b), v[b]);
            complex(row_product(a), v[5], v[6]);
        }
        row(5, v), row(6, w);
        UNROLL for (int b = 0; b < REAL; b++) complex(column_product(b), v[b], w[b]);
        complex(BOTH, (v[5] - w[6]) * scale, (v[6] + w[5]) * scale);
        complex(OPPOSITE, (v[5] + w[6]) * scale, (w[5] - v[6]) * scale);
    }
};
using Left = Factors<true>;
using Right = Factors<false>;

// A weight in PyTorch's layout, (C out, C in, 9 taps), as right factors, (PRODUCTS, C in, C out); with `reversed` those
// of the gradient with respect to the input: input and output channels exchanged, taps in reverse.
inline void weight_factors(const float* weight, bool reversed, float* factors) {
    alignas(64) float taps[TAPS];  // (channel in, tap, channel out)
    if (reversed)
        for (int c = 0; c < C; c++) transpose(weight + c * 9 * C, C, 9, taps + c * 9 * C, C);
    else
        transpose(weight, C, 9 * C, taps, C);
    for (int in = 0; in < C; in++)
        for (int first = 0; first < C; first += LANE) {
            Vec rows[PLACES][3];  // G along the columns of the weight
            UNROLL for (int x = 0; x < 3; x++) {
                Vec w[3], v[PLACES];
                UNROLL for (int y = 0; y < 3; y++) {
                    const int tap = 3 * y + x;
                    w[y] = load(taps + (in * 9 + (reversed ? 8 - tap : tap)) * C + first);
                }
                weight_values(w, v);
                UNROLL for (int a = 0; a < PLACES; a++) rows[a][x] = v[a];
            }
            const auto row = [&](int a, Vec (&v)[PLACES]) { weight_values(rows[a], v); };
            Right{factors + in * C + first, MATRIX}.all(row, 0.5f);  // of twice times twice
        }
}

// The way back: the gradient of a weight from those of its factors, for LANE outputs of one input.
INLINE void weight_taps(const float* products, Vec (&taps)[9]) {
    const auto at = [&](int q) { return load(products + q * MATRIX); };
    const auto real = [&](int q) { return at(q) + at(q + 1); };
    const auto imaginary = [&](int q) { return -(at(q) + at(q + 2)); };
    Vec v[PLACES], rows[3][PLACES], w[3];
    const auto row = [&](int a) {
        weight_from_values(v, w);
        UNROLL for (int s = 0; s < 3; s++) rows[s][a] = w[s];
    };
    UNROLL for (int a = 0; a < REAL; a++) {
        UNROLL for (int b = 0; b < REAL; b++) v[b] = at(real_product(a, b));
        v[5] = real(row_product(a)), v[6] = imaginary(row_product(a));
        row(a);
    }
    UNROLL for (int b = 0; b < REAL; b++) v[b] = real(column_product(b));
    v[5] = (real(BOTH) + real(OPPOSITE)) * 0.5f, v[6] = (imaginary(BOTH) - imaginary(OPPOSITE)) * 0.5f;
    row(5);
    UNROLL for (int b = 0; b < REAL; b++) v[b] = imaginary(column_product(b));
    v[5] = (imaginary(BOTH) + imaginary(OPPOSITE)) * 0.5f, v[6] = (real(OPPOSITE) - real(BOTH)) * 0.5f;
    row(6);
    UNROLL for (int s = 0; s < 3; s++) {
        weight_from_values(rows[s], w);
        UNROLL for (int r = 0; r < 3; r++) taps[3 * r + s] = w[r];
    }
}

// What a thread needs to convolve images of one size. zeros: a row above or below an image; values: B' d of the rows of
// one row of tiles, with the column of zeros on either side of the image.
struct Workspace {
    Buffer<float> products, values, zeros;
    explicit Workspace(Size size)
        : products(PRODUCTS * size.tiles() * C), values(PLACES * (TILE * size.columns() + 2) * C), zeros(size.width * C) {}
};

inline void input_factors(const float* in, Size size, const Workspace& workspace, Left left) {
    const int64_t row = size.width * C, value = (TILE * size.columns() + 2) * C;
    for (int64_t top = 0; top < size.height; top += TILE) {
        const float* rows[PLACES];
        for (int i = 0; i < PLACES; i++) {
            const int64_t y = top - 1 + i;
            rows[i] = y >= 0 && y < size.height ? in + y * row : workspace.zeros;
        }
        for (int64_t x = 0; x < row; x += LANE) {
            Vec d[PLACES], v[PLACES];
            UNROLL for (int i = 0; i < PLACES; i++) d[i] = load(rows[i] + x);
            input_values(d, v);
            UNROLL for (int i = 0; i < PLACES; i++) store(workspace.values + i * value + C + x, v[i]);
        }
        for (int64_t tile = 0; tile < size.columns(); tile++, left.to += C)
            for (int first = 0; first < C; first += LANE)
                Left{left.to + first, left.stride}.all([&](int a, Vec (&v)[PLACES]) {
                    Vec d[PLACES];
                    UNROLL for (int j = 0; j < PLACES; j++)
                        d[j] = load(workspace.values + a * value + (TILE * tile + j) * C + first);
                    input_values(d, v);
                });
    }
}

inline void gradient_factors(const float* dout, Size size, Right right) {
    const int64_t row = size.width * C;
    for (int64_t top = 0; top < size.height; top += TILE)
        for (int64_t side = 0; side < size.width; side += TILE, right.to += C)
            for (int first = 0; first < C; first += LANE) {
                Vec values[PLACES][TILE];
                const float* tile = dout + top * row + side * C + first;
                UNROLL for (int x = 0; x < TILE; x++) {
                    Vec y[TILE], v[PLACES];
                    UNROLL for (int i = 0; i < TILE; i++)
                        y[i] = side + x < size.width && top + i < size.height ? load(tile + i * row + x * C) : Vec{};
                    gradient_values(y, v);
                    UNROLL for (int a = 0; a < PLACES; a++) values[a][x] = v[a];
                }
                Right{right.to + first, right.stride}.all(
                    [&](int a, Vec (&v)[PLACES]) { gradient_values(values[a], v); });
            }
}

// The image from its products, (PRODUCTS, tiles, C).
inline void output_image(const float* products, Size size, float* image) {
    const int64_t row = size.width * C, stride = size.tiles() * C;
    for (int64_t top = 0; top < size.height; top += TILE)
        for (int64_t side = 0; side < size.width; side += TILE, products += C)
            for (int first = 0; first < C; first += LANE) {
                Vec rows[TILE][PLACES];
                const auto at = [&](int q) { return load(products + first + q * stride); };
                const auto column = [&](int b, const Vec (&v)[PLACES]) {
                    Vec y[TILE];
                    output_from_values(v, y);
                    UNROLL for (int i = 0; i < TILE; i++) rows[i][b] = y[i];
                };
                Vec v[PLACES];
                UNROLL for (int b = 0; b < REAL; b++) {
                    UNROLL for (int a = 0; a < REAL; a++) v[a] = at(real_product(a, b));
                    v[5] = at(column_product(b) + 1), v[6] = at(column_product(b) + 2);
                    column(b, v);
                }
                UNROLL for (int a = 0; a < REAL; a++) v[a] = at(row_product(a) + 1);
                v[5] = at(BOTH + 1) + at(OPPOSITE + 1), v[6] = at(BOTH + 2) + at(OPPOSITE + 2);
                column(5, v);
                UNROLL for (int a = 0; a < REAL; a++) v[a] = at(row_product(a) + 2);
                v[5] = at(BOTH + 2) - at(OPPOSITE + 2), v[6] = at(OPPOSITE + 1) - at(BOTH + 1);
                column(6, v);
                for (int i = 0; i < TILE && top + i < size.height; i++) {
                    Vec y[TILE];
                    output_from_values(rows[i], y);
                    float* out = image + (top + i) * row + side * C + first;
                    UNROLL for (int x = 0; x < TILE; x++)
                        if (side + x < size.width) store(out + x * C, y[x]);
                }
            }
}

constexpr bool HELD = REGISTERS == 32 && LANE == C;  // registers hold a C x C matrix

// sum += the channels of each tile's factor times w.
template <int TILES>
INLINE void add_product(const float* factor, const float* w, Vec (&sum)[TILES][C / LANE]) {
    Vec held[C];
    if (HELD)
        UNROLL for (int c = 0; c < C; c++) held[c] = load(w + c * C);
    UNROLL for (int c = 0; c < C; c++)
        UNROLL for (int v = 0; v < C / LANE; v++) {
            const Vec weight = HELD ? held[c] : load(w + c * C + v * LANE);
            UNROLL for (int t = 0; t < TILES; t++) sum[t][v] += factor[t * C + c] * weight;
        }
}

template <int TILES>
INLINE void store_product(const Vec (&sum)[TILES][C / LANE], float* product) {
    UNROLL for (int t = 0; t < TILES; t++)
        UNROLL for (int v = 0; v < C / LANE; v++) store(product + t * C + v * LANE, sum[t][v]);
}

// A real product, in the place of its left factor, plus the same for all tiles where `start` is not null.
template <int TILES>
INLINE void real_products(float* factor, int64_t tiles, const float* w, const float* start) {
    for (; tiles >= TILES; tiles -= TILES, factor += TILES * C) {
        Vec sum[TILES][C / LANE]{};
        if (start)
            UNROLL for (int t = 0; t < TILES; t++)
                UNROLL for (int v = 0; v < C / LANE; v++) sum[t][v] = load(start + v * LANE);
        add_product<TILES>(factor, w, sum);
        store_product<TILES>(sum, factor);
    }
    if constexpr (TILES > 1)
        if (tiles > 0) real_products<TILES / 2>(factor, tiles, w, start);
}

// A complex product: its real part in the place of the second left factor, its imaginary part in that of the third.
template <int TILES>
INLINE void complex_products(float* factor, int64_t stride, int64_t tiles, const float* w) {
    for (; tiles >= TILES; tiles -= TILES, factor += TILES * C) {
        Vec both[TILES][C / LANE]{}, part[TILES][C / LANE];
        add_product<TILES>(factor, w, both);
        for (int i = 1; i < 3; i++) {
            std::memcpy(part, both, sizeof part);
            add_product<TILES>(factor + i * stride, w + i * MATRIX, part);
            store_product<TILES>(part, factor + i * stride);
        }
    }
    if constexpr (TILES > 1)
        if (tiles > 0) complex_products<TILES / 2>(factor, stride, tiles, w);
}

// Images that will soon be read or written, or null. They are fetched into the cache while the processor computes, a few
// lines at a time: more would hold up what comes behind them.
struct Ahead {
    const float *image, *other;

    INLINE void fetch(Size size, int q) const {  // the share of one product
        const int64_t first = q * size.pixels() / PRODUCTS * C, last = (q + 1) * size.pixels() / PRODUCTS * C;
        for (const float* data : {image, other})
            if (data)
                for (int64_t p = first; p < last; p += 16) __builtin_prefetch(data + p, 0, 2);
    }
};

// out = bias + conv(in), w as factors.
inline void convolve(const float* in, Size size, const float* w, const float* bias, float* out, const Workspace& workspace,
                     Ahead ahead = {}) {
    constexpr int TILES = std::min(4, (REGISTERS == 32 ? 24 : 12) * LANE / C);
    const int64_t stride = size.tiles() * C;
    float* products = workspace.products;
    input_factors(in, size, workspace, {products, stride});
    const auto complex = [&](int q) {
        for (int i = 0; i < 3; i++) ahead.fetch(size, q + i);
        complex_products<TILES>(products + q * stride, stride, size.tiles(), w + q * MATRIX);
    };
    for (int a = 0; a < REAL; a++) {
        for (int b = 0; b < REAL; b++) {
            const int q = real_product(a, b);
            ahead.fetch(size, q);  // the product at (1, 1) goes to all pixels of a tile, with weight 1
            real_products<TILES>(products + q * stride, size.tiles(), w + q * MATRIX, a == 1 && b == 1 ? bias : nullptr);
        }
        complex(row_product(a));
    }
    for (int q = column_product(0); q < PRODUCTS; q += 3) complex(q);
    output_image(products, size, out);
}

// Sums over images for the gradient of one convolution's weight. The factors of an image wait for those of another: the
// sums, which registers do not hold, are then read and written half as often.
class WeightGradient {
    static constexpr int IMAGES = 2, INPUTS = REGISTERS == 32 ? 16 : 8;
    Size size;
    int64_t stride;
    int waiting = 0;
    bool fresh = true;  // nothing has been summed yet
    Buffer<float> left, right, products;

    void multiply(Ahead ahead) {
        for (int q = 0; q < PRODUCTS; q++) {
            ahead.fetch(size, q);
            for (int input = 0; input < C; input += INPUTS)
                for (int first = 0; first < C; first += LANE) {
                    const float *x = left + q * stride + input, *d = right + q * stride + first;
                    float* product = products + q * MATRIX + input * C + first;
                    Vec sum[INPUTS];
                    UNROLL for (int c = 0; c < INPUTS; c++) sum[c] = fresh ? Vec{} : load(product + c * C);
                    for (int64_t p = 0; p < waiting * size.tiles() * C; p += C) {
                        const Vec gradient = load(d + p);
                        UNROLL for (int c = 0; c < INPUTS; c++) sum[c] += x[p + c] * gradient;
                    }
                    UNROLL for (int c = 0; c < INPUTS; c++) store(product + c * C, sum[c]);
                }
        }
        waiting = 0;
        fresh = false;
    }

  public:
    explicit WeightGradient(Size size_)
        : size(size_),
          stride(IMAGES * size.tiles() * C + C),  // one line more, as for MATRIX
          left(PRODUCTS * stride),
          right(PRODUCTS * stride),
          products(WEIGHTS) {}

    void add(const float* in, const float* dout, const Workspace& workspace, Ahead ahead = {}) {
        const int64_t place = waiting++ * size.tiles() * C;
        input_factors(in, size, workspace, {left + place, stride});
        gradient_factors(dout, size, {right + place, stride});
        if (waiting == IMAGES) multiply(ahead);
    }

    // The sum over the images since the last call, (C in, 9 taps, C out).
    void finish(float* taps) {
        if (waiting) multiply({});
        for (int in = 0; in < C; in++)
            for (int first = 0; first < C; first += LANE) {
                Vec found[9];
                weight_taps(products + in * C + first, found);
                for (int tap = 0; tap < 9; tap++) store(taps + (in * 9 + tap) * C + first, found[tap]);
            }
        fresh = true;
    }
};

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

// ---- Batch norm and group norm ----

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
    double average[C] = {}, within[C] = {}, between[C] = {};
    for (int64_t i = 0; i < images; i++)
        for (int c = 0; c < C; c++) {
            average[c] += moments[i * 2 * C + c];
            within[c] += moments[i * 2 * C + C + c];
        }
    for (int c = 0; c < C; c++) average[c] /= images;
    for (int64_t i = 0; i < images; i++)
        for (int c = 0; c < C; c++) {
            const double deviation = moments[i * 2 * C + c] - average[c];
            between[c] += deviation * deviation;
        }
    for (int c = 0; c < C; c++) {
        mean[c] = average[c];
        variance[c] = (within[c] + between[c] * size.pixels()) / (double(images) * size.pixels());
    }
}

inline void batch_sums(const float* per_image, int64_t images, float factor, float* sums) {  // (images, 2C) -> (2C)
    double total[2 * C] = {};
    for (int64_t i = 0; i < images; i++)
        for (int c = 0; c < 2 * C; c++) total[c] += per_image[i * 2 * C + c];
    for (int c = 0; c < 2 * C; c++) sums[c] = float(total[c] * factor);
}

// A batch norm or a group norm: z -> scale z + shift, where (z - mean) inverse is the normalised value. On the way back
// the means of d are over a group norm's channels too, and gamma stands before them: inner = gamma, outer = inverse.
// For a batch norm inner = 1, outer = scale. Absent: the identity.
struct alignas(64) Norm {
    float scale[C], shift[C], mean[C], inverse[C], inner[C], outer[C];

    Norm() : shift{}, mean{} {
        for (float* one : {scale, inverse, inner, outer}) std::fill_n(one, C, 1.0f);
    }
    Norm(const float* mean_, const float* variance, const float* gamma, const float* beta, double eps, bool group = false) {
        for (int c = 0; c < C; c++) {
            mean[c] = mean_[c];
            inverse[c] = float(1 / std::sqrt(variance[c] + eps));
            scale[c] = gamma[c] * inverse[c];
            shift[c] = beta[c] - mean[c] * scale[c];
            inner[c] = group ? gamma[c] : 1;
            outer[c] = group ? inverse[c] : scale[c];
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

    // dz = outer (e - mean of e - normalised z * mean of (e normalised z)), e = inner factor d: the two means are over
    // the batch where its own statistics were used, over the group for a group norm, else zero.
    void backward(const float* d, float factor, const float* z, const float* means, Size size, float* dz) const {
        for (int first = 0; first < C; first += LANE) {
            const Vec s = load(outer + first), m = load(mean + first), r = load(inverse + first);
            const Vec gain = load(inner + first) * factor;
            const Vec mean_d = load(means + first), mean_projection = load(means + C + first);
            for (int64_t p = first; p < size.pixels() * C; p += C) {
                const Vec normalised = (load(z + p) - m) * r;
                store(dz + p, s * (load(d + p) * gain - mean_d - normalised * mean_projection));
            }
        }
    }
};

// The group norm of an image z: each of `groups` groups of channels has its own mean and (biased) variance.
inline Norm group_norm(const float* z, Size size, int64_t groups, const float* gamma, const float* beta, double eps) {
    alignas(64) float moments[2 * C], mean[C], variance[C];
    image_moments(z, size, moments);
    const int64_t channels = C / groups;
    for (int64_t first = 0; first < C; first += channels) {
        double average = 0, within = 0, between = 0;
        for (int64_t c = first; c < first + channels; c++) average += moments[c] / double(channels);
        for (int64_t c = first; c < first + channels; c++) {
            within += moments[C + c];
            between += (moments[c] - average) * (moments[c] - average);
        }
        std::fill_n(mean + first, channels, float(average));
        std::fill_n(variance + first, channels, float((within / size.pixels() + between) / channels));
    }
    return Norm(mean, variance, gamma, beta, eps, true);
}

// From an image's sums of d and of d times the normalised z, (2C), the two means that Norm::backward takes.
inline void group_means(const float* sums, Size size, int64_t groups, const float* gamma, float factor, float* means) {
    const int64_t channels = C / groups;
    for (int64_t first = 0; first < 2 * C; first += channels) {
        double total = 0;
        for (int64_t c = first; c < first + channels; c++) total += double(gamma[c % C]) * sums[c];
        std::fill_n(means + first, channels, float(total * factor / double(channels * size.pixels())));
    }
}

}  // namespace conv
