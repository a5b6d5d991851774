// Vectors of floats or doubles as wide as the processor's registers, memory for them, and the activations on them.
//
// GCC's and Clang's vector extensions: +, *, < and ?: act lane by lane, and a scalar operand is spread over
// the lanes. Nothing below names a processor, apart from the two sizes that follow from its register file.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif

// What the functions below have to know of a floating-point format. ln 2 comes in two parts, so that
// n * ln2_high is exact; the coefficients are explained where they are used.
template <class T>
struct Format;

template <>
struct Format<float> {
    typedef float vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint32_t bits __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr uint32_t all_but_sign = ~uint32_t(0) >> 1;
    static constexpr int mantissa = 23, bias = 127, log_terms = 9;
    static constexpr float lowest_exponent = -60, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float exp[] = {1.00000001f, 0.500000001f, 0.166665052f, 0.0416664649f, 0.00836915567f, 0.001393365f};
    static constexpr float power[] = {1.0f,           0.693147203f,   0.240226479f,  0.0555033247f,
                                      0.00961843737f, 0.00133988749f, 0.000153533606f};
    static constexpr float gauss_end = 11;
    static constexpr float tail_over[] = {0.5f, 0.297788617f, 0.0864679163f, 0.00993680936f};
    static constexpr float tail_under[] = {1.0f, 1.39346174f, 0.784758409f, 0.215244591f, 0.0249891989f};
};

template <>
struct Format<double> {
    typedef double vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint64_t bits __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr uint64_t all_but_sign = ~uint64_t(0) >> 1;
    static constexpr int mantissa = 52, bias = 1023, log_terms = 18;
    static constexpr double lowest_exponent = -600, ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723212e-6;
    static constexpr double exp[] = {
        1.0, 0.5000000000000005623, 0.1666666666666667099, 0.04166666666657306773, 0.008333333333326135126,
        0.001388888893251477936, 0.0001984126987482062527, 0.00002480150431378554017, 2.755725540020642443e-6,
        2.762637106569635608e-7, 2.510521700472074516e-8};
    static constexpr double power[] = {
        1.0, 0.693147180559945326, 0.240226506959101313, 0.0555041086648200832, 0.00961812910759411947,
        0.00133335581467746331, 0.000154035304571127593, 1.52527334931167521e-5, 1.32154352820164272e-6,
        1.01781995759282717e-7, 7.07378329338957228e-9, 4.43477072583883042e-10};
    static constexpr double gauss_end = 35;
    static constexpr double tail_over[] = {
        0.5, 0.50229911169384505731, 0.25449815563021401441, 0.077007552354778769944, 0.014474004475998250806,
        0.0015904753867809269777, 8.00790473390850198e-5};
    static constexpr double tail_under[] = {
        1.0, 1.8024827841905660249, 1.4471694958786258595, 0.67340943051474011272, 0.1970573102076964918,
        0.036478576410104416122, 0.0039868830097860045303, 0.00020072472064578426262};
};

template <class T>
using Vector = typename Format<T>::vector;
template <class T>
constexpr int LANES = VECTOR_BYTES / int(sizeof(T));

template <class T>
static inline Vector<T> load(const T* source) {  // at any alignment
    Vector<T> v;
    std::memcpy(&v, source, sizeof v);
    return v;
}

template <class T>
static inline void store(T* target, Vector<T> v) {
    std::memcpy(target, &v, sizeof v);
}

// What Python sees as a MemoryError with this sentence.
class OutOfMemory : public std::bad_alloc {
    std::string sentence;

  public:
    explicit OutOfMemory(int64_t bytes)
        : sentence("The compiled engine found no " + std::to_string((bytes >> 20) + 1) +
                   " MiB of memory: fewer samples at a time, or fewer threads, take less.") {}
    const char* what() const noexcept override { return sentence.c_str(); }
};

template <class T>
class Buffer {  // `count` elements, zero at first, aligned to a cache line
    size_t bytes;
    std::unique_ptr<T, decltype(&std::free)> data;

  public:
    explicit Buffer(int64_t count)
        : bytes((count * sizeof(T) + 63) / 64 * 64), data(static_cast<T*>(std::aligned_alloc(64, bytes)), std::free) {
        if (!data) throw OutOfMemory(bytes);
        std::memset(static_cast<void*>(data.get()), 0, bytes);
    }
    operator T*() const { return data.get(); }
};

// What each of `threads` threads needs for itself, made before they start: out of a parallel region no exception gets
// past its end, and running out of memory there would end the process.
template <class Room, class... Arguments>
std::vector<Room> rooms(int threads, const Arguments&... arguments) {
    std::vector<Room> result;
    result.reserve(threads);
    for (int thread = 0; thread < threads; thread++) result.emplace_back(arguments...);
    return result;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE
#endif
#endif

#ifdef HAS_SHUFFLE
// The halves of a and b, entry by entry in turn: a0 b0 a1 b1 ...; the lower halves, or the upper ones.
template <class T, int HALF, size_t... I>
inline Vector<T> interleave(Vector<T> a, Vector<T> b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, (int(I / 2) + HALF * LANES<T> / 2 + int(I % 2) * LANES<T>)...);
}

// A square of LANES x LANES entries: each round of interleaving row i with row i + LANES / 2 turns the index of an
// entry, (row, column) in binary, by one digit.
template <class T>
inline void transpose_square(const T* from, int64_t from_row, T* to, int64_t to_row) {
    constexpr int N = LANES<T>;
    constexpr auto every = std::make_index_sequence<N>{};
    Vector<T> row[N], turned[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) row[i] = load(from + i * from_row);
#pragma GCC unroll 4
    for (int digit = 1; digit < N; digit *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < N / 2; i++) {
            turned[2 * i] = interleave<T, 0>(row[i], row[i + N / 2], every);
            turned[2 * i + 1] = interleave<T, 1>(row[i], row[i + N / 2], every);
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) row[i] = turned[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) store(to + i * to_row, row[i]);
}
#endif

// from: (rows, columns); to: (columns, rows), its rows `padded` apart.
template <class T>
void transpose(const T* from, int64_t rows, int64_t columns, T* to, int64_t padded) {
    int64_t done_rows = 0, done_columns = 0;
#ifdef HAS_SHUFFLE
    constexpr int64_t N = LANES<T>;
    done_rows = rows / N * N, done_columns = columns / N * N;
    for (int64_t i = 0; i < done_rows; i += N)
        for (int64_t j = 0; j < done_columns; j += N) transpose_square(from + i * columns + j, columns, to + j * padded + i, padded);
#endif
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = j < done_columns ? done_rows : 0; i < rows; i++) to[j * padded + i] = from[i * columns + j];
}

template <class T>
static inline Vector<T> spread(T value) {
    return Vector<T>{} + value;
}

// Even and odd terms apart: two chains of half the length. What bounds these loops is how long they wait.
template <class T, int N>
static inline Vector<T> polynomial(const T (&coefficients)[N], Vector<T> x) {  // constant term first
    static_assert(N > 1);
    const Vector<T> square = x * x;
    Vector<T> last = spread<T>(coefficients[N - 1]), other = spread<T>(coefficients[N - 2]);
#pragma GCC unroll 32
    for (int k = N - 3; k >= 0; k -= 2) {
        last = last * square + coefficients[k];
        if (k > 0) other = other * square + coefficients[k - 1];
    }
    return N % 2 ? last + other * x : other + last * x;
}

template <class T, int N>
struct Coefficients {
    T of[N];
};

template <class T>
constexpr auto odd_reciprocals() {  // 1 / (2 k + 1), from k = 0
    Coefficients<T, Format<T>::log_terms + 1> result{};
    for (int k = 0; k <= Format<T>::log_terms; k++) result.of[k] = 1 / T(2 * k + 1);
    return result;
}

// exp(x), or exp(x) - 1 with small relative error near 0, for x <= 0. With x = n ln 2 + r, |r| <= ln(2) / 2:
// exp(x) = 2^n + 2^n (exp(r) - 1), the bracket r times a polynomial of least largest error. Adding
// 1.5 * 2^mantissa rounds to the whole number n and leaves it in the low bits, from where it is shifted to the
// place of an exponent.
// Far below what rounding sees, exp(x) is 0: subnormal numbers, which it would lead to, take a hundred times longer.
template <class T, bool MINUS_ONE = false>
static inline Vector<T> exponential(Vector<T> x) {
    using F = Format<T>;
    const T rounder = T(1.5) * T(uint64_t(1) << F::mantissa);
    const Vector<T> shifted = x * T(1.44269504088896340736) + rounder, n = shifted - rounder;
    const Vector<T> r = (x - n * F::ln2_high) - n * F::ln2_low;
    const Vector<T> power = (Vector<T>)(((typename F::bits)shifted + F::bias) << F::mantissa);  // 2^n
    const Vector<T> sum = polynomial(Format<T>::exp, r) * r;
    const Vector<T> value = power * sum + (MINUS_ONE ? power - T(1) : power);
    return x < F::lowest_exponent ? spread<T>(MINUS_ONE ? -1 : 0) : value;
}

// exp(-x^2 / 2) for 0 <= x <= gauss_end: 2^y with y = n + r, |r| <= 1/2, and 2^r a polynomial of least largest error.
// As above, n ends in the low bits; here it is added to the exponent of 2^r. Beyond gauss_end, take 0 for it.
template <class T>
static inline Vector<T> gauss(Vector<T> x) {
    using F = Format<T>;
    const T rounder = T(1.5) * T(uint64_t(1) << F::mantissa), scale = T(-0.72134752044448170368);  // -log2(e) / 2
    const Vector<T> square = x * x, shifted = square * scale + rounder, r = square * scale - (shifted - rounder);
    const Vector<T> power = polynomial(F::power, r);
    return (Vector<T>)((typename F::bits)power + ((typename F::bits)shifted << F::mantissa));
}

// An activation gives s(z) and, where asked, s'(z), with autograd's value at a kink. A NaN stays a NaN, and what has
// overflowed is not hidden: GELU at minus infinity, and its slope at both, are NaN as in PyTorch.
enum ActivationName { GELU, RELU, TANH, IDENTITY, SOFTPLUS, LEAKY_RELU };

template <class T, ActivationName NAME, bool DERIVATIVE>
static inline Vector<T> activation(Vector<T> z, Vector<T>* derivative) {
    using V = Vector<T>;
    const V zero = spread<T>(0), one = spread<T>(1);
    const V magnitude = (V)((typename Format<T>::bits)z & Format<T>::all_but_sign);
    if constexpr (NAME == GELU) {
        // z Phi(z) = max(z, 0) - |z| Phi(-|z|). Phi(-x) exp(x^2 / 2) is close to a ratio of polynomials, all of whose
        // coefficients are positive, fitted for the least largest error of Phi: 3e-10 in float, 2e-17 in double.
        const V end = spread<T>(Format<T>::gauss_end), x = magnitude > end ? end : magnitude;
        const V density = magnitude > end ? zero : gauss<T>(x);  // times sqrt(2 pi)
        const V tail = polynomial(Format<T>::tail_over, x) / polynomial(Format<T>::tail_under, x);
        if (DERIVATIVE) {
            const V below = (tail - magnitude * T(0.398942280401432677940)) * density;
            *derivative = z < 0 ? below : one - below;
        }
        return (z < 0 ? z * T(0) : z) - x * (tail * density);  // minus infinity times 0 is NaN
    } else if constexpr (NAME == RELU) {
        if (DERIVATIVE) *derivative = z > 0 ? one : zero;
        return z < 0 ? zero : z;
    } else if constexpr (NAME == TANH) {
        const V e = exponential<T, true>(magnitude * T(-2)), t = -e / (e + T(2));
        if (DERIVATIVE) *derivative = one - t * t;
        return z < 0 ? -t : t;
    } else if constexpr (NAME == SOFTPLUS) {
        // max(z, 0) + log(1 + e) with e = exp(-|z|); log((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + ...), s <= 1/3.
        const V e = exponential<T>(-magnitude), s = e / (e + T(2)), square = s * s;
        static constexpr auto series = odd_reciprocals<T>();
        const V sum = polynomial(series.of, square);
        if (DERIVATIVE) *derivative = (z < 0 ? e : one) / (one + e);
        const V value = (z < 0 ? zero : z) + s * sum * T(2);
        return z > 20 ? z : value;  // as PyTorch has it
    } else if constexpr (NAME == LEAKY_RELU) {
        if (DERIVATIVE) *derivative = z > 0 ? one : spread<T>(T(0.01));
        return z > 0 ? z : z * T(0.01);
    } else {
        if (DERIVATIVE) *derivative = one;
        return z;
    }
}
