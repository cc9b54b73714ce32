// The steps of a run and its noise levels, as fastddim/samplers/{steps,spacings,levels,rows}.py have them, in double.
// A state is `x = signal * x0 + sigma * noise`. Where `pow`, `exp`, `log` or `hypot` come in, they are the C library's.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fastddim/exact.hpp"
#include "fastddim/schedule.hpp"

namespace fastddim {

enum class FinalSigmas { zero, sigma_min };

/// Which steps a run takes: a number of them, or a list.
struct Steps {
    /// How many steps; the method and the schedule space them.
    std::optional<std::int64_t> num_inference_steps;
    /// What the model is called with at each step, descending, instead.
    std::optional<std::vector<double>> timesteps;
    /// The noise's scale beside an x0 of scale 1 at each step, and behind the last one, descending, instead; those of flow
    /// matching end before the last 0 and are shifted. With timesteps, the two are the run's levels as they are.
    std::optional<std::vector<double>> sigmas;
    /// For a number of steps; by default the schedule's own.
    std::optional<Spacing> spacing;
    /// In (0, 1]; below 1 only the last part of the steps is taken.
    double strength = 1;

    Steps() = default;
    // Implicit, so that a number is what a method takes.
    Steps(std::int64_t count) : num_inference_steps(count) {}

    /// Throws std::invalid_argument: a value out of range, or a list and a number.
    void validate() const {
        if (num_inference_steps.has_value() == (timesteps || sigmas))
            throw std::invalid_argument("num_inference_steps, timesteps, sigmas: pass a number of steps, or a list");
        if (num_inference_steps)
            detail::require_int("num_inference_steps", *num_inference_steps, 1, DDIMConfig::largest_num_train_timesteps);
        for (std::size_t k = 0; timesteps && k < timesteps->size(); ++k)
            if (!std::isfinite((*timesteps)[k]))
                throw std::invalid_argument(
                    detail::text("timesteps: entry ", k, " is ", (*timesteps)[k], "; pass finite numbers"));
        for (std::size_t k = 0; sigmas && k < sigmas->size(); ++k) {
            const double sigma = (*sigmas)[k];
            if (!std::isfinite(sigma) || sigma < 0 || (sigma == 0 && k + 1 < sigmas->size()))
                throw std::invalid_argument(detail::text("sigmas: entry ", k, " is ", sigma,
                                                         "; pass finite numbers above 0, and 0 at the end alone"));
        }
        detail::require_number("strength", strength, 0, 1);
        if (spacing && !num_inference_steps)
            throw std::invalid_argument("spacing: given with a list of steps; pass num_inference_steps instead");
    }

    /// Throws std::invalid_argument: what a method that steps through training timesteps does not take.
    void require_no_sigmas(const char* method) const {
        validate();
        if (sigmas || spacing)
            throw std::invalid_argument(detail::text(
                sigmas ? "sigmas" : "spacing", ": given for method '", method, "', which steps through training ",
                "timesteps; pass timesteps, or another method such as 'euler' or 'dpmsolver++'"));
    }

    /// The first of n steps that `strength` leaves (diffusers' `get_timesteps`).
    std::size_t first_of(std::size_t n) const {
        const auto kept = static_cast<std::size_t>(static_cast<double>(n) * strength);
        if (n != 0 && kept == 0)
            throw std::invalid_argument(detail::text("strength: ", strength, " of ", n, " steps leaves none; pass at ",
                                                     "least ", 1.0 / static_cast<double>(n)));
        return n - kept;
    }
};

/// The states of a run, the noisiest first.
struct NoiseLevels {
    /// What the model is called with at each state but the last.
    std::vector<double> timesteps;
    bool float_timesteps = true;
    /// One more than timesteps.
    std::vector<double> signal, sigma;
    PredictionType prediction_type = PredictionType::epsilon;
    /// A run starts from standard normal noise times this number.
    double start_scale = 1;
    /// Of `PredictionType::edm`: sigma_data.
    double data_scale = 1;
    /// How many steps before these a `strength` has left out.
    std::size_t skipped = 0;

    std::size_t size() const noexcept { return timesteps.size(); }
};

FASTDDIM_EXACT_BEGIN

namespace detail {

/// numpy.arange for a negative step down to 0.
inline std::vector<double> descending_to_zero(double start, double step) {
    FASTDDIM_EXACT
    const auto count = static_cast<std::size_t>(std::max(0.0, std::ceil(-start / step)));
    std::vector<double> values(count, start);
    const double difference = (start + step) - start;
    for (std::size_t k = 1; k < count; ++k)
        values[k] = k == 1 ? start + step : start + static_cast<double>(k) * difference;
    return values;
}

/// numpy.interp of one number; `known` ascends.
inline double interpolate(double x, const std::vector<double>& known, const std::vector<double>& values) {
    FASTDDIM_EXACT
    if (std::isnan(x)) return x;
    if (x < known.front()) return values.front();
    if (x >= known.back()) return values.back();
    const auto after = std::upper_bound(known.begin(), known.end(), x);
    const auto k = static_cast<std::size_t>(after - known.begin()) - 1;
    if (known[k] == x) return values[k];
    const double slope = (values[k + 1] - values[k]) / (known[k + 1] - known[k]);
    return slope * (x - known[k]) + values[k];
}

inline std::vector<double> counted(std::size_t count) {
    std::vector<double> values(count);
    for (std::size_t k = 0; k < count; ++k) values[k] = static_cast<double>(k);
    return values;
}

/// arXiv:2206.00364, equation 5.
inline std::vector<double> space_karras(std::int64_t n, double lowest, double highest) {
    FASTDDIM_EXACT
    constexpr double rho = 7.0;
    const double last = std::pow(lowest, 1.0 / rho), first = std::pow(highest, 1.0 / rho);
    std::vector<double> sigmas = linspace(0.0, 1.0, n);
    for (double& sigma : sigmas) sigma = std::pow(first + sigma * (last - first), rho);
    return sigmas;
}

/// Evenly in the logarithm.
inline std::vector<double> space_exponential(std::int64_t n, double lowest, double highest) {
    std::vector<double> sigmas = linspace(std::log(highest), std::log(lowest), n);
    for (double& sigma : sigmas) sigma = std::exp(sigma);
    return sigmas;
}

/// As far from each other as the last one from the clean end.
inline std::vector<double> space_uniform(std::int64_t n, double highest) {
    FASTDDIM_EXACT
    std::vector<double> sigmas;
    for (std::int64_t k = n; k > 0; --k) sigmas.push_back(highest * (static_cast<double>(k) / static_cast<double>(n)));
    return sigmas;
}

/// The list published for a model, log-linear between its own levels for another number than 10 steps.
inline std::vector<double> space_align_your_steps(Spacing model, std::int64_t n) {
    // Published for 10 steps (arXiv:2404.14507), with the level behind the last one.
    static constexpr std::array<std::array<double, 11>, 3> published{{
        {14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029},
        {14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029},
        {700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002},
    }};
    const auto index = static_cast<std::size_t>(model) - static_cast<std::size_t>(Spacing::align_your_steps_sd15);
    std::vector<double> given;
    for (const double level : published.at(index)) given.push_back(std::log(level));
    const std::vector<double> known = linspace(0.0, 1.0, static_cast<std::int64_t>(given.size()));
    std::vector<double> levels = linspace(0.0, 1.0, n + 1);
    for (double& level : levels) level = std::exp(interpolate(level, known, given));
    // The run's last step leads to the clean end instead of the list's last level.
    levels.pop_back();
    return levels;
}

/// Throws std::invalid_argument: `Spacing::beta`.
inline std::vector<double> space(Spacing spacing, std::int64_t n, double lowest, double highest) {
    if (spacing == Spacing::karras) return space_karras(n, lowest, highest);
    if (spacing == Spacing::uniform) return space_uniform(n, highest);
    if (spacing == Spacing::exponential) return space_exponential(n, lowest, highest);
    if (spacing == Spacing::beta)
        throw std::invalid_argument(
            "spacing: 'beta' takes quantiles of the beta distribution, which C++ does not have; pass the table at run "
            "time, or sigmas");
    return space_align_your_steps(spacing, n);
}

/// Levels that fit each other; throws std::invalid_argument where the noise rises.
inline NoiseLevels checked(NoiseLevels levels) {
    FASTDDIM_EXACT
    const std::size_t n = levels.size();
    if (n == 0 || levels.signal.size() != n + 1 || levels.sigma.size() != n + 1)
        throw std::invalid_argument(text("sigmas: ", levels.sigma.size(), " for ", n,
                                         " timesteps; pass one more than timesteps, and at least one timestep"));
    for (std::size_t k = 0; k < n; ++k) {
        // sigma / signal, as a comparison that signal 0 does not upset, nor a rounding where a level is repeated.
        const double most = levels.sigma[k] * levels.signal[k + 1] * (1.0 + 1e-12);
        if (!(levels.sigma[k + 1] * levels.signal[k] <= most))
            throw std::invalid_argument(text("sigmas, timesteps: the noise rises at step ", k, " (timestep ",
                                             levels.timesteps[k], "); pass them descending"));
    }
    return levels;
}

/// The whole numbers of a list of training timesteps.
inline std::vector<std::int64_t> whole(const std::vector<double>& timesteps, std::int64_t n_train) {
    std::vector<std::int64_t> values;
    for (const double t : timesteps) {
        if (!(t >= 0 && t < static_cast<double>(n_train) && t == std::floor(t)))
            throw std::invalid_argument(text("timesteps: ", t, "; pass an integer in [0, ", n_train - 1, "]"));
        values.push_back(static_cast<std::int64_t>(t));
    }
    return values;
}

/// The transitions of a method that is defined at training timesteps alone.
inline std::vector<Transition> transitions_of(const Schedule& schedule, const Steps& steps, const char* method,
                                              Transitions kind = Transitions::exact) {
    steps.require_no_sigmas(method);
    std::vector<Transition> pairs =
        steps.timesteps ? schedule.transitions(whole(*steps.timesteps, schedule.config().num_train_timesteps), kind)
                        : schedule.transitions(*steps.num_inference_steps, kind);
    pairs.erase(pairs.begin(), pairs.begin() + static_cast<std::ptrdiff_t>(steps.first_of(pairs.size())));
    return pairs;
}

/// The levels at transitions that follow each other; `clean_end`: the last one is 1 instead of the schedule's.
inline NoiseLevels beta_levels(const Schedule& schedule, const std::vector<Transition>& pairs, bool clean_end = false) {
    FASTDDIM_EXACT
    NoiseLevels levels;
    levels.float_timesteps = false;
    levels.prediction_type = schedule.config().prediction_type;
    std::vector<double> alpha_bars;
    for (const Transition& pair : pairs) {
        levels.timesteps.push_back(static_cast<double>(pair.t));
        alpha_bars.push_back(schedule.alpha_bar(pair.t));
    }
    alpha_bars.push_back(clean_end ? 1.0 : schedule.alpha_bar(pairs.back().t_next));
    for (const double alpha_bar : alpha_bars) {
        levels.signal.push_back(std::sqrt(alpha_bar));
        levels.sigma.push_back(std::sqrt(1.0 - alpha_bar));
    }
    return checked(std::move(levels));
}

/// Levels with signal and sigma still to be set, from the first step that `strength` leaves on.
inline NoiseLevels from_step(std::size_t first, std::vector<double> timesteps, std::vector<double>& sigmas) {
    const auto skipped = static_cast<std::ptrdiff_t>(std::min(first, std::min(timesteps.size(), sigmas.size())));
    timesteps.erase(timesteps.begin(), timesteps.begin() + skipped);
    sigmas.erase(sigmas.begin(), sigmas.begin() + skipped);
    NoiseLevels levels;
    levels.timesteps = std::move(timesteps);
    levels.skipped = first;
    return levels;
}

/// The levels of states `x0 + sigma * noise`, divided by `sqrt(sigma**2 + data_scale**2)` but for the last, unless
/// `scale_end`; without a start scale a run starts as noise of the first sigma.
inline NoiseLevels scaled_levels(NoiseLevels levels, const std::vector<double>& sigmas, std::optional<double> start_scale,
                                 bool scale_end = false) {
    FASTDDIM_EXACT
    for (std::size_t k = 0; k < sigmas.size(); ++k) {
        const bool divided = k + 1 < sigmas.size() || (scale_end && sigmas[k] != 0);
        const double norm = divided ? std::hypot(sigmas[k], levels.data_scale) : 1.0;
        levels.signal.push_back(1.0 / norm);
        levels.sigma.push_back(sigmas[k] / norm);
    }
    levels = checked(std::move(levels));
    levels.start_scale = start_scale.value_or(levels.sigma.front());
    return levels;
}

/// The levels of flow matching (arXiv:2403.03206, section 2): `x = (1 - sigma) * x0 + sigma * noise`.
inline NoiseLevels flow_levels(const FlowSchedule& schedule, const Steps& steps, std::optional<double> mu) {
    FASTDDIM_EXACT
    schedule.validate();
    steps.validate();
    const auto n_train = static_cast<double>(schedule.num_train_timesteps);
    std::vector<double> sigmas = steps.sigmas.value_or(std::vector<double>{});
    std::vector<double> timesteps = steps.timesteps.value_or(std::vector<double>{});
    if (!steps.timesteps || !steps.sigmas) {
        if (steps.timesteps)
            for (const double t : timesteps) sigmas.push_back(t / n_train);
        for (const double sigma : sigmas)
            if (!(sigma > 0 && sigma <= 1))
                throw std::invalid_argument(text(steps.timesteps ? "timesteps: " : "sigmas: ",
                                                 steps.timesteps ? sigma * n_train : sigma,
                                                 " with a FlowSchedule; pass numbers above 0 and up to ",
                                                 steps.timesteps ? n_train : 1.0));
        sigmas = steps.num_inference_steps ? schedule.sigmas(*steps.num_inference_steps, mu)
                                           : schedule.sigmas(std::move(sigmas), mu);
        if (steps.spacing) sigmas = space(*steps.spacing, *steps.num_inference_steps, sigmas.back(), sigmas.front());
        if (!sigmas.empty() && steps.spacing && sigmas.front() > 1)
            throw std::invalid_argument(
                "spacing: it has levels above 1, which flow matching has not; pass karras, exponential, beta or uniform");
        if (!steps.timesteps)
            for (const double sigma : sigmas) timesteps.push_back(sigma * n_train);
        sigmas.push_back(0.0);
    }
    const std::size_t first = steps.first_of(sigmas.empty() ? 0 : sigmas.size() - 1);
    NoiseLevels levels = from_step(first, std::move(timesteps), sigmas);
    levels.prediction_type = PredictionType::flow;
    for (const double sigma : sigmas) levels.signal.push_back(1.0 - sigma);
    levels.sigma = std::move(sigmas);
    return checked(std::move(levels));
}

/// The levels of EDM's models (arXiv:2206.00364), which are called with `log(sigma) / 4`.
inline NoiseLevels edm_levels(const EDMSchedule& schedule, const Steps& steps, FinalSigmas final_sigmas) {
    schedule.validate();
    steps.validate();
    std::vector<double> sigmas, timesteps;
    if (steps.sigmas) {
        sigmas = *steps.sigmas;
    } else if (steps.timesteps) {
        throw std::invalid_argument(
            "timesteps: given to an EDMSchedule, whose models are called with log(sigma) / 4; pass sigmas");
    } else {
        sigmas = space(steps.spacing.value_or(schedule.sigma_schedule), *steps.num_inference_steps, schedule.sigma_min,
                       schedule.sigma_max);
        sigmas.push_back(final_sigmas == FinalSigmas::zero ? 0.0 : schedule.sigma_min);
    }
    for (std::size_t k = 0; k + 1 < sigmas.size(); ++k) timesteps.push_back(std::log(sigmas[k]) / 4.0);
    const std::size_t first = steps.first_of(timesteps.size());
    NoiseLevels levels = from_step(first, std::move(timesteps), sigmas);
    levels.prediction_type = PredictionType::edm;
    levels.data_scale = schedule.prediction_type == PredictionType::epsilon ? schedule.sigma_data : -schedule.sigma_data;
    double start = 1.0;
    // diffusers' `init_noise_sigma`.
    if (first == 0 && !sigmas.empty())
        start = std::hypot(schedule.sigma_max, 1.0) / std::hypot(sigmas.front(), levels.data_scale);
    return scaled_levels(std::move(levels), sigmas, start);
}

/// The sigmas of a beta schedule's timesteps, ascending, and what lies between them.
class TrainingSigmas {
   public:
    explicit TrainingSigmas(const Schedule& schedule) {
        FASTDDIM_EXACT
        // diffusers' alpha_bar at the end of training where zero terminal SNR would make it 0, so that sigma is finite.
        constexpr double least = 1.0 / (1 << 24);
        for (const double value : schedule.alphas_cumprod()) {
            // A cosine schedule ends lower than that without being 0.
            const double alpha_bar = value == 0 ? least : value;
            values_.push_back(std::sqrt((1.0 - alpha_bar) / alpha_bar));
        }
    }

    const std::vector<double>& values() const noexcept { return values_; }

    /// The sigmas of timesteps, linear between whole ones; throws std::invalid_argument: one outside of training's.
    std::vector<double> at(std::vector<double> timesteps) const {
        const std::vector<double> known = counted(values_.size());
        for (double& t : timesteps) {
            if (!(t >= 0 && t <= known.back()))
                throw std::invalid_argument(text("timesteps: ", t, "; pass numbers in [0, ", known.back(), "]"));
            t = interpolate(t, known, values_);
        }
        return timesteps;
    }

    /// The timesteps of sigmas, linear in the logarithm between whole ones.
    std::vector<double> timesteps_of(std::vector<double> sigmas) const {
        const std::vector<double> numbers = counted(values_.size());
        std::vector<double> logs;
        for (const double value : values_) logs.push_back(std::log(value));
        for (double& sigma : sigmas) sigma = interpolate(std::log(std::max(sigma, 1e-10)), logs, numbers);
        return sigmas;
    }

    /// The sigma behind the last step: 0, or the least of training.
    double last(FinalSigmas final_sigmas) const noexcept {
        return final_sigmas == FinalSigmas::zero ? 0.0 : values_.front();
    }

   private:
    std::vector<double> values_;
};

/// What step k leaves of sigma / signal.
inline double noise_ratio(const NoiseLevels& levels, std::size_t k) {
    FASTDDIM_EXACT
    const double before = levels.sigma[k] * levels.signal[k + 1];
    // All of it between two states without signal.
    if (before == 0) return 1.0;
    const double ratio = levels.sigma[k + 1] * levels.signal[k] / before;
    // NaN stays what it is.
    return ratio > 1.0 ? 1.0 : ratio;
}

/// `x_next = signal_next * x0 + direction * epsilon + noise_scale * noise`.
inline StepCoefficients linear_row(const NoiseLevels& levels, std::size_t k, double direction, double noise_scale,
                                   bool use_clipped_model_output) {
    return step_coefficients(levels.signal[k], levels.sigma[k], levels.signal[k + 1], direction, noise_scale,
                             levels.prediction_type, use_clipped_model_output, levels.data_scale);
}

/// `x_next = from_x * x + from_x0 * x0 + noise_scale * noise`, with nothing of the raw output.
inline StepCoefficients x0_row(const NoiseLevels& levels, std::size_t k, double from_x, double from_x0,
                               double noise_scale) {
    const StepCoefficients row = linear_row(levels, k, 0, 0, false);
    return {row[0], row[1], from_x, 0, from_x0, noise_scale};
}

/// The table of a run, its rows still to be added; throws std::invalid_argument: a timestep or scale that is not finite.
inline StepTable begin_table(const NoiseLevels& levels) {
    StepTable table;
    for (std::size_t k = 0; k < levels.size(); ++k)
        if (!std::isfinite(levels.timesteps[k]))
            throw std::invalid_argument(text("timesteps: row ", k, " is ", levels.timesteps[k], "; pass finite numbers"));
    require_positive("start_scale", levels.start_scale);
    table.timesteps = levels.timesteps;
    table.float_timesteps = levels.float_timesteps;
    table.start_scale = levels.start_scale;
    table.noising = {levels.signal.front(), levels.sigma.front()};
    return table;
}

/// The table of a run, its row k made by `row(k)`.
template <typename Row>
StepTable make_table(const NoiseLevels& levels, Row row) {
    StepTable table = begin_table(levels);
    for (std::size_t k = 0; k < levels.size(); ++k) table.rows.push_back(row(k));
    return table;
}

}  // namespace detail

FASTDDIM_EXACT_END

}  // namespace fastddim
