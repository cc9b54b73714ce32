// Schedules, timesteps and step tables, as fastddim/schedule.py and fastddim/coefficients.py have them, in double.
// The cosine of `squaredcos_cap_v2` is the C library's; all else is rounded as IEEE 754 says, so the same everywhere.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <locale>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastddim/exact.hpp"

namespace fastddim {

enum class BetaSchedule { linear, scaled_linear, squaredcos_cap_v2 };
enum class PredictionType { epsilon, sample, v_prediction };
enum class TimestepSpacing { leading, trailing, linspace, quadratic };

namespace detail {

/// The parts of a message, as a stream shows them.
template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    out.imbue(std::locale::classic());
    out.precision(17);
    (out << ... << parts);
    return out.str();
}

template <class To, class From>
std::vector<unsigned char> to_bytes(const std::vector<From>& values) {
    std::vector<unsigned char> bytes(values.size() * sizeof(To));
    for (std::size_t k = 0; k < values.size(); ++k) {
        To value;
        if constexpr (std::is_same_v<To, From>) {
            value = values[k];
        } else {
            value = static_cast<To>(values[k]);
        }
        std::memcpy(bytes.data() + k * sizeof(To), &value, sizeof(To));
    }
    return bytes;
}

inline std::int64_t require_int(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (value < low || value > high)
        throw std::invalid_argument(text(name, ": ", value, "; pass an integer in [", low, ", ", high, "]"));
    return value;
}

}  // namespace detail

/// What the schedule and the step need to know of a model; fields and defaults are diffusers' `DDIMScheduler`'s.
struct DDIMConfig {
    // More than any model has, and little enough to keep in memory.
    static constexpr std::int64_t largest_num_train_timesteps = 10'000'000;

    std::int64_t num_train_timesteps = 1000;
    double beta_start = 0.0001;
    double beta_end = 0.02;
    BetaSchedule beta_schedule = BetaSchedule::linear;
    std::optional<std::vector<double>> trained_betas;
    bool clip_sample = true;
    bool set_alpha_to_one = true;
    std::int64_t steps_offset = 0;
    PredictionType prediction_type = PredictionType::epsilon;
    bool thresholding = false;
    double dynamic_thresholding_ratio = 0.995;
    double clip_sample_range = 1.0;
    double sample_max_value = 1.0;
    TimestepSpacing timestep_spacing = TimestepSpacing::leading;
    bool rescale_betas_zero_snr = false;

    /// Takes the number of timesteps from `trained_betas`, and throws std::invalid_argument for a value out of range.
    void validate() {
        if (trained_betas) count_trained_betas();
        detail::require_int("num_train_timesteps", num_train_timesteps, 1, largest_num_train_timesteps);
        detail::require_int("steps_offset", steps_offset, 0, num_train_timesteps - 1);
        if (!(0 < beta_start && beta_start <= beta_end && beta_end < 1))
            throw std::invalid_argument(detail::text("beta_start, beta_end: ", beta_start, ", ", beta_end,
                                                     "; pass 0 < beta_start <= beta_end < 1"));
        if (rescale_betas_zero_snr && num_train_timesteps < 2)
            throw std::invalid_argument("rescale_betas_zero_snr: true needs num_train_timesteps >= 2");
        if (thresholding) {
            if (!(dynamic_thresholding_ratio >= 0 && dynamic_thresholding_ratio <= 1))
                throw std::invalid_argument(detail::text("dynamic_thresholding_ratio: ", dynamic_thresholding_ratio,
                                                         "; pass a number in [0, 1]"));
            require_positive("sample_max_value", sample_max_value);
        } else if (clip_sample) {
            require_positive("clip_sample_range", clip_sample_range);
        }
    }

   private:
    static void require_positive(const char* name, double value) {
        if (!(value > 0 && std::isfinite(value)))
            throw std::invalid_argument(detail::text(name, ": ", value, "; pass a finite number > 0"));
    }

    void count_trained_betas() {
        const std::vector<double>& betas = *trained_betas;
        if (betas.empty()) throw std::invalid_argument("trained_betas: empty; pass one number per training timestep");
        for (std::size_t k = 0; k < betas.size(); ++k) {
            const bool last_is_one = k + 1 == betas.size() && betas[k] == 1;
            if (!(0 < betas[k] && betas[k] < 1) && !last_is_one)
                throw std::invalid_argument(
                    detail::text("trained_betas: entry ", k, " is ", betas[k],
                                 "; pass one number in (0, 1) per training timestep, the last may be 1"));
        }
        const auto count = static_cast<std::int64_t>(betas.size());
        if (num_train_timesteps != 1000 && num_train_timesteps != count)
            throw std::invalid_argument(detail::text("num_train_timesteps: ", num_train_timesteps, " differs from the ",
                                                     count, " trained_betas; pass num_train_timesteps=", count));
        num_train_timesteps = count;
    }
};

/// A step from a training timestep to a less noisy one, or, without `t_next`, to the clean end behind timestep 0.
struct Transition {
    std::int64_t t = 0;
    std::optional<std::int64_t> t_next;
};

FASTDDIM_EXACT_BEGIN

namespace detail {

/// numpy.linspace for `count` >= 1.
inline std::vector<double> linspace(double start, double stop, std::int64_t count) {
    FASTDDIM_EXACT
    std::vector<double> values(static_cast<std::size_t>(count), start);
    if (count == 1) return values;
    const double step = (stop - start) / static_cast<double>(count - 1);
    for (std::size_t k = 0; k < values.size(); ++k) values[k] = static_cast<double>(k) * step + start;
    values.back() = stop;
    return values;
}

inline std::vector<double> make_betas(const DDIMConfig& config) {
    FASTDDIM_EXACT
    const std::int64_t n = config.num_train_timesteps;
    if (config.trained_betas) return *config.trained_betas;
    if (config.beta_schedule == BetaSchedule::linear) return linspace(config.beta_start, config.beta_end, n);
    if (config.beta_schedule == BetaSchedule::scaled_linear) {
        std::vector<double> values = linspace(std::sqrt(config.beta_start), std::sqrt(config.beta_end), n);
        for (double& value : values) value = value * value;
        return values;
    }
    // Nichol and Dhariwal, arXiv:2102.09672, equation 17, with their cap of 0.999.
    constexpr double pi = 3.141592653589793;
    std::vector<double> edges(static_cast<std::size_t>(n) + 1);
    for (std::size_t k = 0; k < edges.size(); ++k) {
        const double root = std::cos((static_cast<double>(k) / static_cast<double>(n) + 0.008) / 1.008 * pi / 2.0);
        edges[k] = root * root;
    }
    std::vector<double> betas(static_cast<std::size_t>(n));
    for (std::size_t k = 0; k < betas.size(); ++k) betas[k] = std::min(1.0 - edges[k + 1] / edges[k], 0.999);
    return betas;
}

inline std::vector<double> make_alphas_cumprod(const DDIMConfig& config) {
    FASTDDIM_EXACT
    std::vector<double> values = make_betas(config);
    double product = 1.0;
    for (double& value : values) value = product = product * (1.0 - value);
    if (config.rescale_betas_zero_snr) {
        // arXiv:2305.08891, algorithm 1.
        const double first = std::sqrt(values.front()), last = std::sqrt(values.back());
        for (double& value : values) {
            const double root = (std::sqrt(value) - last) * (first / (first - last));
            value = root * root;
        }
    }
    return values;
}

}  // namespace detail

/// The descending training timesteps of a run, by `config.timestep_spacing`.
///
/// Throws std::invalid_argument: more steps than training timesteps, or an offset that leaves their range.
inline std::vector<std::int64_t> make_timesteps(const DDIMConfig& config, std::int64_t num_inference_steps) {
    FASTDDIM_EXACT
    const std::int64_t n_train = config.num_train_timesteps, n = num_inference_steps;
    detail::require_int("num_inference_steps", n, 1, n_train);
    const auto count = static_cast<std::size_t>(n);
    std::vector<std::int64_t> timesteps(count);
    if (config.timestep_spacing == TimestepSpacing::leading) {
        for (std::size_t k = 0; k < count; ++k)
            timesteps[count - 1 - k] = static_cast<std::int64_t>(k) * (n_train / n) + config.steps_offset;
    } else if (config.timestep_spacing == TimestepSpacing::trailing) {
        // numpy.arange adds multiples of the difference of its first two numbers.
        const auto start = static_cast<double>(n_train);
        const double difference = (start + -start / static_cast<double>(n)) - start;
        for (std::size_t k = 0; k < count; ++k)
            timesteps[k] = std::llrint(start + static_cast<double>(k) * difference) - 1;
    } else if (config.timestep_spacing == TimestepSpacing::linspace) {
        const std::vector<double> ascending = detail::linspace(0.0, static_cast<double>(n_train - 1), n);
        for (std::size_t k = 0; k < count; ++k) timesteps[count - 1 - k] = std::llrint(ascending[k]);
    } else if (n == 1) {
        timesteps.front() = n_train - 1;
    } else {
        // floor(c * i**2) of arXiv:2010.02502, appendix D.2; repeated timesteps move up to the next free one.
        const std::vector<double> roots = detail::linspace(0.0, std::sqrt(static_cast<double>(n_train - 1)), n);
        std::int64_t highest = -1;
        for (std::size_t k = 0; k < count; ++k) {
            const auto floored = static_cast<std::int64_t>(std::floor(roots[k] * roots[k] + 1e-9));
            highest = std::max(highest + 1, floored);
            timesteps[count - 1 - k] = highest;
        }
    }
    if (timesteps.front() >= n_train)
        throw std::invalid_argument(detail::text(
            "steps_offset: ", config.steps_offset, " with ", n, " leading steps puts the first timestep at ",
            timesteps.front(), ", past the last training timestep ", n_train - 1, "; pass steps_offset <= ",
            n_train - 1 - (n - 1) * (n_train / n)));
    return timesteps;
}

/// A noise schedule: what training fixed, and nothing of how it is sampled.
class Schedule {
   public:
    /// Throws std::invalid_argument: a configuration with a value out of range.
    explicit Schedule(DDIMConfig config = {}) : config_(std::move(config)) {
        config_.validate();
        alphas_cumprod_ = detail::make_alphas_cumprod(config_);
    }

    const DDIMConfig& config() const noexcept { return config_; }
    const std::vector<double>& alphas_cumprod() const noexcept { return alphas_cumprod_; }

    /// alpha_bar of a training timestep, or, without one, of the clean end: 1 with `set_alpha_to_one`, else timestep 0's.
    double alpha_bar(std::optional<std::int64_t> t) const {
        if (!t) return config_.set_alpha_to_one ? 1.0 : alphas_cumprod_.front();
        return alphas_cumprod_.at(static_cast<std::size_t>(*t));
    }

    /// The transitions of a run of `num_inference_steps` steps, in sampling order.
    std::vector<Transition> transitions(std::int64_t num_inference_steps) const {
        return to_transitions(make_timesteps(config_, num_inference_steps));
    }

    /// The transitions over an explicit list; throws std::invalid_argument where it does not descend.
    std::vector<Transition> transitions(const std::vector<std::int64_t>& timesteps) const {
        if (timesteps.empty()) throw std::invalid_argument("timesteps: empty; pass at least one");
        for (std::size_t k = 0; k < timesteps.size(); ++k) {
            detail::require_int("timesteps", timesteps[k], 0, config_.num_train_timesteps - 1);
            if (k != 0 && timesteps[k] >= timesteps[k - 1])
                throw std::invalid_argument(detail::text("timesteps: entry ", k, " (", timesteps[k],
                                                         ") is not below entry ", k - 1, " (", timesteps[k - 1],
                                                         "); pass them descending"));
        }
        return to_transitions(timesteps);
    }

   private:
    static std::vector<Transition> to_transitions(const std::vector<std::int64_t>& timesteps) {
        std::vector<Transition> pairs(timesteps.size());
        for (std::size_t k = 0; k < pairs.size(); ++k) {
            pairs[k].t = timesteps[k];
            if (k + 1 < pairs.size()) pairs[k].t_next = timesteps[k + 1];
        }
        return pairs;
    }

    DDIMConfig config_;
    std::vector<double> alphas_cumprod_;
};

/// A step's coefficients: x0_from_x, x0_from_output, next_from_x, next_from_output, next_from_x0, noise_scale.
using StepCoefficients = std::array<double, 6>;

/// Everything a run needs beside its model.
struct StepTable {
    /// What the model is called with at each step, in any order; whole numbers unless `float_timesteps`.
    std::vector<double> timesteps;
    std::vector<StepCoefficients> rows;
    /// Whether the model takes its timesteps as float, not as 64-bit integers.
    bool float_timesteps = false;
    /// A run starts from standard normal noise times this number.
    double start_scale = 1;
    /// What brings a clean state to the first step, as `(*noising)[0] * x0 + (*noising)[1] * noise`; none where the method
    /// has no such rule.
    std::optional<std::array<double, 2>> noising;

    std::size_t size() const noexcept { return rows.size(); }

    /// Whether any step adds noise.
    bool stochastic() const noexcept {
        return std::any_of(rows.begin(), rows.end(), [](const StepCoefficients& row) { return row[5] != 0; });
    }

    /// The first `count` steps.
    StepTable first(std::size_t count) const {
        StepTable part = *this;
        part.timesteps.resize(count);
        part.rows.resize(count);
        return part;
    }

    /// What the model takes timesteps as, in numpy's words.
    const char* timestep_dtype() const noexcept { return float_timesteps ? "float32" : "int64"; }

    /// The timesteps as graphs and kernels take them, in bytes.
    std::vector<unsigned char> timestep_bytes() const { return bytes_of(timesteps); }

    /// One step's, for each of `count` samples.
    std::vector<unsigned char> timestep_bytes(std::size_t step, std::size_t count) const {
        return bytes_of(std::vector<double>(count, timesteps.at(step)));
    }

    /// The columns as graphs take them: float `[size(), 6]`, row by row.
    std::vector<float> columns() const {
        std::vector<float> values;
        values.reserve(6 * rows.size());
        for (const StepCoefficients& row : rows)
            for (const double value : row) values.push_back(static_cast<float>(value));
        return values;
    }

    /// The table of a list of transitions (arXiv:2010.02502, equations 12 and 16).
    ///
    /// eta: in [0, 1]; 0 is DDIM, 1 is DDPM.
    /// use_clipped_model_output: derive epsilon from the limited x0 instead of the raw model output.
    ///
    /// Throws std::invalid_argument: eta or a transition out of range, or an epsilon prediction without signal.
    static StepTable build(const Schedule& schedule, const std::vector<Transition>& transitions, double eta = 0.0,
                           bool use_clipped_model_output = false) {
        if (!(eta >= 0 && eta <= 1))
            throw std::invalid_argument(
                detail::text("eta: ", eta, "; pass a number in [0, 1] (0 is DDIM, 1 is DDPM)"));
        const std::int64_t n_train = schedule.config().num_train_timesteps;
        StepTable table;
        for (const Transition& pair : transitions) {
            // An absent t_next compares below every number.
            if (!(0 <= pair.t && 0 <= pair.t_next.value_or(0) && pair.t_next < pair.t && pair.t < n_train))
                throw std::invalid_argument(
                    detail::text("transitions: (", pair.t, ", ", pair.t_next ? detail::text(*pair.t_next) : "none",
                                 "); pass 0 <= t_next < t < ", n_train, ", or no t_next for the clean end"));
            const double alpha_bar = schedule.alpha_bar(pair.t), alpha_bar_next = schedule.alpha_bar(pair.t_next);
            const PredictionType kind = schedule.config().prediction_type;
            if (kind == PredictionType::epsilon && alpha_bar == 0)
                throw std::invalid_argument(
                    detail::text("prediction_type: 'epsilon' at timestep ", pair.t,
                                 ", which has no signal (zero terminal SNR), so x0 cannot be told from it; use a "
                                 "v_prediction or sample model, or a spacing that does not start there ('leading')"));
            table.timesteps.push_back(static_cast<double>(pair.t));
            table.rows.push_back(row(alpha_bar, alpha_bar_next, eta, kind, use_clipped_model_output));
        }
        return table;
    }

   private:
    std::vector<unsigned char> bytes_of(const std::vector<double>& values) const {
        return float_timesteps ? detail::to_bytes<float>(values) : detail::to_bytes<std::int64_t>(values);
    }

    static StepCoefficients row(double alpha_bar, double alpha_bar_next, double eta, PredictionType kind,
                                bool use_clipped_model_output) {
        FASTDDIM_EXACT
        // A product of many alphas underflows to 0, and so does the quotient of two; `large` is 1 there.
        constexpr double tiny = std::numeric_limits<double>::min();
        const double least_next = std::max(alpha_bar_next, tiny);
        const double large = 1.0 - alpha_bar / least_next;
        const double ratio = (1.0 - alpha_bar_next) / std::max(1.0 - alpha_bar, tiny);
        const double noise_scale = eta * std::sqrt(ratio * large);
        // 1 - alpha_bar_next - noise_scale**2 as a sum of positive terms: at eta 1 the difference cancels to nothing.
        const double direction = std::sqrt(
            ratio * ((1.0 - eta * eta) * large + alpha_bar * (1.0 - alpha_bar_next) / least_next));
        const double signal = std::sqrt(alpha_bar), sigma = std::sqrt(1.0 - alpha_bar);
        // Epsilon and x0 in terms of the state, the output and the limited x0.
        double x0_x = 0, x0_output = 1, eps_x = 1 / sigma, eps_output = -signal / sigma, eps_x0 = 0;
        if (kind == PredictionType::epsilon) {
            x0_x = 1 / signal, x0_output = -sigma / signal, eps_x = 0, eps_output = 1;
        } else if (kind == PredictionType::v_prediction) {
            x0_x = signal, x0_output = -sigma, eps_x = sigma, eps_output = signal;
        }
        if (use_clipped_model_output) eps_x = 1 / sigma, eps_output = 0, eps_x0 = -signal / sigma;
        return {x0_x,
                x0_output,
                direction * eps_x,
                direction * eps_output,
                std::sqrt(alpha_bar_next) + direction * eps_x0,
                noise_scale};
    }
};

FASTDDIM_EXACT_END

}  // namespace fastddim
