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
/// What a model predicts. The last two are those of a `FlowSchedule`, noise - x0, and of an `EDMSchedule`, the output of
/// EDM's preconditioning; a `DDIMConfig` has one of the others.
enum class PredictionType { epsilon, sample, v_prediction, flow, edm };
enum class TimestepSpacing { leading, trailing, linspace, quadratic };
enum class VarianceType { fixed_small, fixed_large };
/// Where a step leads: to the list's own next timestep, or to `t - num_train_timesteps / steps`, as diffusers has it.
enum class Transitions { exact, diffusers };
enum class TimeShift { exponential, linear };
/// How a number of steps is spaced: noise levels from the highest to the lowest.
enum class Spacing { karras, exponential, beta, uniform, align_your_steps_sd15, align_your_steps_sdxl, align_your_steps_svd };

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

inline double require_number(const char* name, double value, double low, double high) {
    if (!(value >= low && value <= high))
        throw std::invalid_argument(text(name, ": ", value, "; pass a number in [", low, ", ", high, "]"));
    return value;
}

inline double require_positive(const char* name, double value) {
    if (!(value > 0 && std::isfinite(value)))
        throw std::invalid_argument(text(name, ": ", value, "; pass a finite number > 0"));
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
        if (prediction_type == PredictionType::flow || prediction_type == PredictionType::edm)
            throw std::invalid_argument(
                "prediction_type: 'flow' or 'edm' with betas; pass epsilon, sample or v_prediction");
        if (rescale_betas_zero_snr && num_train_timesteps < 2)
            throw std::invalid_argument("rescale_betas_zero_snr: true needs num_train_timesteps >= 2");
        if (thresholding) {
            detail::require_number("dynamic_thresholding_ratio", dynamic_thresholding_ratio, 0, 1);
            detail::require_positive("sample_max_value", sample_max_value);
        } else if (clip_sample) {
            detail::require_positive("clip_sample_range", clip_sample_range);
        }
    }

   private:
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
    std::vector<Transition> transitions(std::int64_t num_inference_steps, Transitions kind = Transitions::exact) const {
        return to_transitions(make_timesteps(config_, num_inference_steps), kind);
    }

    /// The transitions over an explicit list; throws std::invalid_argument where it does not descend.
    std::vector<Transition> transitions(const std::vector<std::int64_t>& timesteps,
                                        Transitions kind = Transitions::exact) const {
        if (timesteps.empty()) throw std::invalid_argument("timesteps: empty; pass at least one");
        for (std::size_t k = 0; k < timesteps.size(); ++k) {
            detail::require_int("timesteps", timesteps[k], 0, config_.num_train_timesteps - 1);
            if (k != 0 && timesteps[k] >= timesteps[k - 1])
                throw std::invalid_argument(detail::text("timesteps: entry ", k, " (", timesteps[k],
                                                         ") is not below entry ", k - 1, " (", timesteps[k - 1],
                                                         "); pass them descending"));
        }
        return to_transitions(timesteps, kind);
    }

   private:
    std::vector<Transition> to_transitions(const std::vector<std::int64_t>& timesteps, Transitions kind) const {
        std::vector<Transition> pairs(timesteps.size());
        const std::int64_t stride = config_.num_train_timesteps / static_cast<std::int64_t>(pairs.size());
        for (std::size_t k = 0; k < pairs.size(); ++k) {
            pairs[k].t = timesteps[k];
            if (kind == Transitions::diffusers) {
                if (timesteps[k] >= stride) pairs[k].t_next = timesteps[k] - stride;
            } else if (k + 1 < pairs.size()) {
                pairs[k].t_next = timesteps[k + 1];
            }
        }
        return pairs;
    }

    DDIMConfig config_;
    std::vector<double> alphas_cumprod_;
};

/// The noise levels of flow matching (SD 3, Flux), as diffusers' `FlowMatchEulerDiscreteScheduler` has them.
struct FlowSchedule {
    /// The model is called with `sigma * num_train_timesteps`.
    std::int64_t num_train_timesteps = 1000;
    /// Towards noise, arXiv:2403.03206, equation 23.
    double shift = 1.0;
    /// Shift by a `mu` of the image's size instead.
    bool use_dynamic_shifting = false;
    /// The line that gives `mu`.
    double base_shift = 0.5;
    double max_shift = 1.15;
    std::int64_t base_image_seq_len = 256;
    std::int64_t max_image_seq_len = 4096;
    /// Stretch the levels so that the last one is this number.
    std::optional<double> shift_terminal;
    /// What `mu` is: the logarithm of the shift, or the shift.
    TimeShift time_shift_type = TimeShift::exponential;

    /// Throws std::invalid_argument: a value out of range.
    void validate() const {
        detail::require_int("num_train_timesteps", num_train_timesteps, 1, DDIMConfig::largest_num_train_timesteps);
        detail::require_positive("shift", shift);
        if (shift_terminal) detail::require_number("shift_terminal", *shift_terminal, 0, 1);
    }

    /// The shift of an image of so many tokens.
    double mu(std::int64_t image_seq_len) const noexcept {
        FASTDDIM_EXACT
        const double slope = (max_shift - base_shift) / static_cast<double>(max_image_seq_len - base_image_seq_len);
        return base_shift + static_cast<double>(image_seq_len - base_image_seq_len) * slope;
    }

    /// Levels in (0, 1], descending, shifted, without the clean end: a number of them, evenly spaced before the shift, or
    /// those of a list. Throws std::invalid_argument: a `mu` that is missing or has no use, or an empty list.
    std::vector<double> sigmas(std::int64_t num_inference_steps, std::optional<double> image_mu = {}) const {
        FASTDDIM_EXACT
        double lowest = 1.0 / static_cast<double>(num_train_timesteps);
        if (!image_mu) lowest = shifted(lowest, shift);
        return sigmas(detail::linspace(1.0, lowest, num_inference_steps), image_mu);
    }

    std::vector<double> sigmas(std::vector<double> levels, std::optional<double> image_mu = {}) const {
        FASTDDIM_EXACT
        if (use_dynamic_shifting && !image_mu)
            throw std::invalid_argument(
                "mu: missing with use_dynamic_shifting; pass one, such as schedule.mu(image_seq_len)");
        if (!use_dynamic_shifting && image_mu)
            throw std::invalid_argument(
                detail::text("mu: ", *image_mu, " without use_dynamic_shifting; leave it out, or pass shift"));
        if (levels.empty()) throw std::invalid_argument("sigmas, timesteps: empty; pass at least one");
        double by = image_mu.value_or(shift);
        if (image_mu && time_shift_type == TimeShift::exponential) by = std::exp(by);
        for (double& level : levels) level = shifted(level, by);
        if (shift_terminal.value_or(0) != 0) {
            const double last = levels.back();
            if (last == 1)
                throw std::invalid_argument(detail::text("shift_terminal: ", *shift_terminal,
                                                         " with a last level of 1; pass more steps, or leave it out"));
            for (double& level : levels) level = 1.0 - (1.0 - level) * ((1.0 - *shift_terminal) / (1.0 - last));
        }
        return levels;
    }

   private:
    static double shifted(double level, double by) noexcept {
        FASTDDIM_EXACT
        return by * level / (1.0 + (by - 1.0) * level);
    }
};

/// The noise levels of models with EDM's preconditioning (arXiv:2206.00364), as diffusers' EDM schedulers have them.
struct EDMSchedule {
    double sigma_min = 0.002;
    double sigma_max = 80.0;
    /// Deviation of the data, by which the preconditioning scales.
    double sigma_data = 0.5;
    /// How a run spaces them, `karras` or `exponential`.
    Spacing sigma_schedule = Spacing::karras;
    /// `epsilon` or `v_prediction`, the sign of the model's output.
    PredictionType prediction_type = PredictionType::epsilon;

    /// Throws std::invalid_argument: a value out of range.
    void validate() const {
        if (prediction_type != PredictionType::epsilon && prediction_type != PredictionType::v_prediction)
            throw std::invalid_argument("prediction_type: another one for an EDMSchedule; pass epsilon or v_prediction");
        if (sigma_schedule != Spacing::karras && sigma_schedule != Spacing::exponential)
            throw std::invalid_argument("sigma_schedule: another one for an EDMSchedule; pass karras or exponential");
        const bool ascend = 0 < sigma_min && sigma_min < sigma_max && std::isfinite(sigma_max);
        if (!ascend || !(0 < sigma_data && std::isfinite(sigma_data)))
            throw std::invalid_argument(
                detail::text("sigma_min, sigma_max, sigma_data: ", sigma_min, ", ", sigma_max, ", ", sigma_data,
                             "; pass finite numbers, 0 < sigma_min < sigma_max and 0 < sigma_data"));
    }
};

/// A step's coefficients: x0_from_x, x0_from_output, next_from_x, next_from_output, next_from_x0, noise_scale.
using StepCoefficients = std::array<double, 6>;

namespace detail {

/// A step's coefficients from its square roots: `x_next = signal_next * x0 + direction * epsilon + noise_scale * noise`.
/// `data_scale` is that of `PredictionType::edm`: sigma_data, with which `(data_scale * signal)**2 + sigma**2` is 1.
inline StepCoefficients step_coefficients(double signal, double sigma, double signal_next, double direction,
                                          double noise_scale, PredictionType kind, bool use_clipped_model_output,
                                          double data_scale = 1) {
    FASTDDIM_EXACT
    // x0 and epsilon in terms of the state, the output and the limited x0.
    double x0_x = signal, x0_output = -sigma, eps_x = sigma, eps_output = signal, eps_x0 = 0;
    if (kind == PredictionType::epsilon) {
        x0_x = 1 / signal, x0_output = -sigma / signal, eps_x = 0, eps_output = 1;
    } else if (kind == PredictionType::sample) {
        x0_x = 0, x0_output = 1, eps_x = 1 / sigma, eps_output = -signal / sigma;
    } else if (kind == PredictionType::flow) {
        x0_x = 1, x0_output = -sigma, eps_x = 1, eps_output = signal;
    } else if (kind == PredictionType::edm) {
        x0_x = data_scale * data_scale * signal, x0_output = data_scale * sigma, eps_output = -data_scale * signal;
    }
    if (use_clipped_model_output) eps_x = 1 / sigma, eps_output = 0, eps_x0 = -signal / sigma;
    return {x0_x, x0_output, direction * eps_x, direction * eps_output, signal_next + direction * eps_x0, noise_scale};
}

}  // namespace detail

/// Everything a run needs beside its model; a sampling method is what makes one.
struct StepTable {
    /// What the model is called with at each step, in any order; whole numbers unless `float_timesteps`.
    std::vector<double> timesteps;
    std::vector<StepCoefficients> rows;
    /// What each step takes of the x0 of the step before it, the seventh column; empty where none looks back.
    std::vector<double> next_from_previous_x0;
    /// Whether the model takes its timesteps as float, not as 64-bit integers.
    bool float_timesteps = false;
    /// A run starts from standard normal noise times this number.
    double start_scale = 1;
    /// What brings a clean state to the first step, as `(*noising)[0] * x0 + (*noising)[1] * noise`; none where the method
    /// has no such rule.
    std::optional<std::array<double, 2>> noising;

    std::size_t size() const noexcept { return rows.size(); }

    /// Whether the table has the column of the previous x0.
    bool looks_back() const noexcept { return !next_from_previous_x0.empty(); }

    std::size_t num_columns() const noexcept { return looks_back() ? 7 : 6; }

    /// Whether any step adds noise.
    bool stochastic() const noexcept {
        return std::any_of(rows.begin(), rows.end(), [](const StepCoefficients& row) { return row[5] != 0; });
    }

    /// The first `count` steps.
    StepTable first(std::size_t count) const {
        StepTable part = *this;
        part.timesteps.resize(count);
        part.rows.resize(count);
        if (looks_back()) part.next_from_previous_x0.resize(count);
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

    /// The columns as graphs take them: float `[size(), num_columns()]`, row by row.
    std::vector<float> columns() const {
        std::vector<float> values;
        values.reserve(num_columns() * rows.size());
        for (std::size_t step = 0; step < rows.size(); ++step) {
            for (const double value : rows[step]) values.push_back(static_cast<float>(value));
            if (looks_back()) values.push_back(static_cast<float>(next_from_previous_x0[step]));
        }
        return values;
    }

    /// The table of a list of transitions (arXiv:2010.02502, equations 12 and 16).
    ///
    /// eta: in [0, 1]; 0 is DDIM, 1 is DDPM.
    /// use_clipped_model_output: derive epsilon from the limited x0 instead of the raw model output.
    /// variance_type: `fixed_large` is the paper's sigma-hat, and needs eta 1.
    ///
    /// Throws std::invalid_argument: eta or a transition out of range, or an epsilon prediction without signal.
    static StepTable build(const Schedule& schedule, const std::vector<Transition>& transitions, double eta = 0.0,
                           bool use_clipped_model_output = false,
                           VarianceType variance_type = VarianceType::fixed_small) {
        if (!(eta >= 0 && eta <= 1))
            throw std::invalid_argument(
                detail::text("eta: ", eta, "; pass a number in [0, 1] (0 is DDIM, 1 is DDPM)"));
        if (variance_type == VarianceType::fixed_large && eta != 1)
            throw std::invalid_argument(
                detail::text("variance_type: 'fixed_large' is DDPM's larger variance, so eta is 1 there; eta: ", eta));
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
            table.rows.push_back(row(alpha_bar, alpha_bar_next, eta, variance_type, kind, use_clipped_model_output));
            if (!table.noising) table.noising = {std::sqrt(alpha_bar), std::sqrt(1.0 - alpha_bar)};
        }
        return table;
    }

   private:
    std::vector<unsigned char> bytes_of(const std::vector<double>& values) const {
        return float_timesteps ? detail::to_bytes<float>(values) : detail::to_bytes<std::int64_t>(values);
    }

    static StepCoefficients row(double alpha_bar, double alpha_bar_next, double eta, VarianceType variance_type,
                                PredictionType kind, bool use_clipped_model_output) {
        FASTDDIM_EXACT
        // A product of many alphas underflows to 0, and so does the quotient of two; `large` is 1 there.
        constexpr double tiny = std::numeric_limits<double>::min();
        const double least_next = std::max(alpha_bar_next, tiny);
        const double large = 1.0 - alpha_bar / least_next;
        const double ratio = (1.0 - alpha_bar_next) / std::max(1.0 - alpha_bar, tiny);
        const double std_dev = eta * std::sqrt(ratio * large);
        // 1 - alpha_bar_next - std_dev**2 as a sum of positive terms: at eta 1 the difference cancels to nothing.
        const double direction = std::sqrt(
            ratio * ((1.0 - eta * eta) * large + alpha_bar * (1.0 - alpha_bar_next) / least_next));
        return detail::step_coefficients(std::sqrt(alpha_bar), std::sqrt(1.0 - alpha_bar), std::sqrt(alpha_bar_next),
                                         direction, variance_type == VarianceType::fixed_small ? std_dev : std::sqrt(large),
                                         kind, use_clipped_model_output);
    }
};

FASTDDIM_EXACT_END

}  // namespace fastddim
