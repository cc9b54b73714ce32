// Counter-based normal noise, bit for bit that of fastddim/noise.py: Philox4x32-10 (Salmon et al., SC'11), then
// Box-Muller with polynomials in float additions and multiplications.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastddim/exact.hpp"

namespace fastddim {

/// What noise is for: a step's own, or the starting state.
enum class Stream : std::uint32_t { step = 0, initial = 1 };

namespace detail {

inline float float_of(std::uint32_t bits) noexcept {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t bits_of(float value) noexcept {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

}  // namespace detail

/// Philox4x32-10 of four counter words and a 64-bit key.
inline std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter, std::uint64_t seed) noexcept {
    auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{counter[0]} * 0xD2511F53U, p1 = std::uint64_t{counter[2]} * 0xCD9E8D57U;
        counter = {static_cast<std::uint32_t>(p1 >> 32) ^ counter[1] ^ k0, static_cast<std::uint32_t>(p1),
                   static_cast<std::uint32_t>(p0 >> 32) ^ counter[3] ^ k1, static_cast<std::uint32_t>(p0)};
        k0 += 0x9E3779B9U;
        k1 += 0xBB67AE85U;
    }
    return counter;
}

FASTDDIM_EXACT_BEGIN

namespace detail {

template <std::size_t N>
float polynomial(float x, const std::array<float, N>& coefficients) noexcept {
    FASTDDIM_EXACT
    float total = coefficients[N - 1];
    for (std::size_t k = N - 1; k-- > 0;) total = total * x + coefficients[k];
    return total;
}

/// Natural logarithm of `u` in (0, 1].
inline float log_of(float u) noexcept {
    FASTDDIM_EXACT
    constexpr std::int32_t sqrt_half = 0x3F3504F3;
    constexpr std::array<float, 7> fit{0.333338379F, -0.25001732F,  0.199660708F, -0.16566227F,
                                       0.148710846F, -0.143447577F, 0.0892735042F};
    const std::int32_t bits = static_cast<std::int32_t>(bits_of(u)) - sqrt_half;
    const std::int32_t exponent = bits >> 23;
    const float t = float_of(static_cast<std::uint32_t>(bits - exponent * (1 << 23) + sqrt_half)) - 1.0F;
    const float square = t * t;
    const float tail = square * t * polynomial(t, fit) - square * 0.5F;
    const auto e = static_cast<float>(exponent);
    return e * 0.693359375F + (t + (tail + e * -2.12194440e-4F));
}

}  // namespace detail

/// Two independent normals from two 32-bit words.
inline std::pair<float, float> box_muller(std::uint32_t word0, std::uint32_t word1) noexcept {
    FASTDDIM_EXACT
    constexpr std::array<float, 4> sin_fit{1.57079632F, -0.645963479F, 0.0796802281F, -0.00460217699F};
    constexpr std::array<float, 4> cos_fit{0.999999972F, -1.23369701F, 0.253598644F, -0.0204083525F};
    // A half-step off zero: the radius ends at 6.76 instead of infinity.
    const float u = static_cast<float>(word0) * 0x1p-32F + 0x1p-33F;
    const float radius = std::sqrt(detail::log_of(u) * -2.0F);
    // The top two bits choose the quadrant, the others the angle in it, in [-1/2, 1/2) quarter turns.
    const std::int32_t angle = static_cast<std::int32_t>(word1 & 0x3FFFFFFFU) - 0x20000000;
    const float f = static_cast<float>(angle) * 0x1p-30F;
    const float square = f * f;
    const float sine = f * detail::polynomial(square, sin_fit), cosine = detail::polynomial(square, cos_fit);
    const bool odd = (word1 & 0x40000000U) != 0, negative = (word1 & 0x80000000U) != 0;
    const float x = odd ? -sine : cosine, y = odd ? cosine : sine;
    return {radius * (negative ? -x : x), radius * (negative ? -y : y)};
}

FASTDDIM_EXACT_END

/// Writes one sample's `count` standard normals to `out`.
inline void normal(std::uint64_t seed, std::uint32_t step, Stream stream, std::size_t count, float* out) noexcept {
    for (std::size_t first = 0; first < count; first += 4) {
        const std::uint64_t group = first / 4;
        const auto words = philox({static_cast<std::uint32_t>(group), static_cast<std::uint32_t>(group >> 32), step,
                                   static_cast<std::uint32_t>(stream)},
                                  seed);
        const auto low = box_muller(words[0], words[1]), high = box_muller(words[2], words[3]);
        const std::array<float, 4> four{low.first, low.second, high.first, high.second};
        for (std::size_t k = 0; k < 4 && first + k < count; ++k) out[first + k] = four[k];
    }
}

/// Writes a batch's noise `[seeds.size(), count]` to `out`; sample k depends on seed k alone.
inline void normal(const std::vector<std::uint64_t>& seeds, std::uint32_t step, Stream stream, std::size_t count,
                   float* out) noexcept {
    for (std::size_t k = 0; k < seeds.size(); ++k) normal(seeds[k], step, stream, count, out + k * count);
}

/// One seed per sample; an integer s stands for s, s + 1, ...
class Seeds {
   public:
    Seeds(std::uint64_t first) : values_{first}, counting_(true) {}
    Seeds(std::vector<std::uint64_t> each) : values_(std::move(each)) {}

    /// Throws std::invalid_argument: another number of seeds than samples, or a count past 2**64.
    std::vector<std::uint64_t> of_batch(std::size_t batch) const {
        if (!counting_) {
            if (values_.size() != batch)
                throw std::invalid_argument("seeds: " + std::to_string(values_.size()) + " for a batch of " +
                                            std::to_string(batch) + "; pass one per sample, or one integer");
            return values_;
        }
        std::vector<std::uint64_t> all(batch);
        for (std::size_t k = 0; k < batch; ++k) all[k] = values_[0] + k;
        if (batch != 0 && all.back() < values_[0])
            throw std::invalid_argument("seeds: " + std::to_string(values_[0]) + " and the " +
                                        std::to_string(batch - 1) + " after it; pass integers in [0, 2**64)");
        return all;
    }

   private:
    std::vector<std::uint64_t> values_;
    bool counting_ = false;
};

}  // namespace fastddim
