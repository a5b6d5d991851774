// Vectors of floats or doubles as wide as the processor's registers, and the activations on them.
//
// GCC's and Clang's vector extensions: +, *, < and ?: act lane by lane, and a scalar operand is spread over
// the lanes. Nothing below names a processor, apart from the two sizes that follow from its register file.
#pragma once

#include <cstdint>
#include <cstring>

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
    static constexpr int mantissa = 23, bias = 127, log_terms = 9;
    static constexpr float lowest_exponent = -60, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float exp[] = {1.00000001f, 0.500000001f, 0.166665052f, 0.0416664649f, 0.00836915567f, 0.001393365f};
    static constexpr float phi_scale = 0.275f;
    static constexpr bool phi_centred = false;
    static constexpr float phi[] = {0.11780925f, 0.0421114981f, 0.333932255f, -0.330993369f, 0.451998701f, -0.11485833f};
};

template <>
struct Format<double> {
    typedef double vector __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint64_t bits __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int mantissa = 52, bias = 1023, log_terms = 18;
    static constexpr double lowest_exponent = -600, ln2_high = 0.693145751953125, ln2_low = 1.42860682030941723212e-6;
    static constexpr double exp[] = {
        1.0, 0.5000000000000005623, 0.1666666666666667099, 0.04166666666657306773, 0.008333333333326135126,
        0.001388888893251477936, 0.0001984126987482062527, 0.00002480150431378554017, 2.755725540020642443e-6,
        2.762637106569635608e-7, 2.510521700472074516e-8};
    static constexpr double phi_scale = 0.2;
    static constexpr bool phi_centred = true;
    static constexpr double phi[] = {
        0.1538386099500125, 0.13307650057801138, 0.09906112319401485, 0.0627066313342537, 0.03300407323329384,
        0.013823727741528489, 0.004159013372214366, 0.0005986753499478565, -0.00015957397769884589,
        -0.00010897977863603805, -1.1874689206000356e-05, 9.952394767640808e-06, 3.3349280810107897e-06,
        -7.956652487096422e-07, -5.51461175290049e-07, 6.632063180589436e-08, 8.392473244630429e-08,
        -7.248058057834879e-09, -1.1423592869969709e-08, 1.0405006450053617e-09, 9.894673339443195e-10,
        -1.0784200347438742e-10};
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

// An activation gives s(z) and, where asked, s'(z), with autograd's value at a kink. A NaN stays a NaN.
enum ActivationName { GELU, RELU, TANH, IDENTITY, SOFTPLUS, LEAKY_RELU };

template <class T, ActivationName NAME, bool DERIVATIVE>
static inline Vector<T> activation(Vector<T> z, Vector<T>* derivative) {
    using V = Vector<T>;
    const V zero = spread<T>(0), one = spread<T>(1), magnitude = z < 0 ? -z : z;
    if constexpr (NAME == GELU) {
        // z Phi(z). For z >= 0, Phi(-z) exp(z^2 / 2) is smooth in t = 1 / (1 + c z), without constant term: its
        // polynomial was fitted for the least largest error of Phi, 5e-9 in float. In double it is the Chebyshev
        // interpolant, in u = 2 t - 1, whose coefficients stay small (relative error of Phi(-z): 1.3e-15).
        const V density = exponential<T>(z * z * T(-0.5));  // times sqrt(2 pi)
        const V t = one / (one + magnitude * Format<T>::phi_scale);
        const V tail = polynomial(Format<T>::phi, Format<T>::phi_centred ? t * T(2) - one : t) * t * density;
        const V cdf = z < 0 ? tail : one - tail;
        if (DERIVATIVE) *derivative = cdf + z * density * T(0.398942280401432677940);
        return z * cdf;
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
