// Sampling methods, as fastddim/samplers/ has them: a struct of options each, called with a schedule and steps for a table.
//     fastddim::DPMSolver solver;
//     solver.solver_order = 1;
//     const fastddim::StepTable table = solver(fastddim::Schedule(), 20);
// A value out of range is a std::invalid_argument. Tables have the bits of Python's where arithmetic and square roots make
// them; where `pow`, `exp`, `log` or `hypot` come in they differ by its rounding.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "fastddim/exact.hpp"
#include "fastddim/levels.hpp"
#include "fastddim/schedule.hpp"

namespace fastddim {

enum class TimestepType { discrete, continuous };
enum class AlgorithmType { dpmsolver, sde_dpmsolver };
enum class SolverType { midpoint, heun };

namespace detail {

/// Throws std::invalid_argument: an option for another kind of schedule is given.
inline void require_unused(bool given, const char* name, const char* schedule) {
    if (given)
        throw std::invalid_argument(text(name, ": given with a ", schedule, ", which has none; leave it out"));
}

}  // namespace detail

/// DDIM (arXiv:2010.02502), equations 12 and 16: `StepTable::build` on the transitions of a run.
struct DDIM {
    static constexpr const char* name = "ddim";

    double eta = 0;
    VarianceType variance_type = VarianceType::fixed_small;
    bool use_clipped_model_output = false;
    Transitions transitions = Transitions::exact;

    StepTable operator()(const Schedule& schedule, const Steps& steps) const {
        return StepTable::build(schedule, detail::transitions_of(schedule, steps, name, transitions), eta,
                                use_clipped_model_output, variance_type);
    }
};

/// DDPM (arXiv:2006.11239): equation 7's mean of x and x0, with one of section 3.2's variances. Its last step leads to the
/// clean end, whatever `set_alpha_to_one` says, without noise.
struct DDPM {
    static constexpr const char* name = "ddpm";

    /// The posterior's own, or beta.
    VarianceType variance_type = VarianceType::fixed_small;

    StepTable operator()(const Schedule& schedule, const Steps& steps) const;
};

/// Euler's method (arXiv:2206.00364, algorithm 1 without churn): `x_next = x0 + sigma_next * epsilon` in units of the
/// signal, along the line from x to x0. For flow matching this is `x + (sigma_next - sigma) * v`. With betas the state is
/// divided by `sqrt(sigma**2 + 1)`, as the model is called with it.
struct Euler {
    static constexpr const char* name = "euler";

    /// `sigma_min` stops at the least level of training.
    FinalSigmas final_sigmas_type = FinalSigmas::zero;
    /// The range of a spacing, for betas; by default the run's own.
    std::optional<double> sigma_min, sigma_max;
    /// `continuous`: a model with betas is called with `log(sigma) / 4`.
    TimestepType timestep_type = TimestepType::discrete;
    /// Shift of a `FlowSchedule` that has `use_dynamic_shifting`.
    std::optional<double> mu;
    /// Draw the noise of the next level anew.
    bool stochastic_sampling = false;
    /// Derive epsilon from the limited x0.
    bool use_clipped_model_output = false;

    StepTable operator()(const Schedule& schedule, const Steps& steps) const;
    StepTable operator()(const FlowSchedule& schedule, const Steps& steps) const {
        require_none_of_betas("FlowSchedule");
        detail::require_unused(final_sigmas_type != FinalSigmas::zero, "final_sigmas_type", "FlowSchedule");
        return table(detail::flow_levels(schedule, steps, mu));
    }
    StepTable operator()(const EDMSchedule& schedule, const Steps& steps) const {
        detail::require_unused(mu.has_value(), "mu", "EDMSchedule");
        require_none_of_betas("EDMSchedule", schedule.sigma_min, schedule.sigma_max);
        return table(detail::edm_levels(schedule, steps, final_sigmas_type));
    }

   private:
    /// An EDM scheduler's configuration has its own range under these names.
    void require_none_of_betas(const char* schedule, std::optional<double> own_sigma_min = {},
                               std::optional<double> own_sigma_max = {}) const {
        detail::require_unused(sigma_min && sigma_min != own_sigma_min, "sigma_min", schedule);
        detail::require_unused(sigma_max && sigma_max != own_sigma_max, "sigma_max", schedule);
        detail::require_unused(timestep_type != TimestepType::discrete, "timestep_type", schedule);
    }
    StepTable table(const NoiseLevels& levels) const;
};

/// Euler's step down to sigma_down, then noise of scale sigma_up (k-diffusion's `sample_euler_ancestral`).
struct EulerAncestral {
    static constexpr const char* name = "euler_ancestral";

    /// In [0, 1], how much of the posterior's noise is drawn.
    double eta = 1;
    FinalSigmas final_sigmas_type = FinalSigmas::zero;
    bool use_clipped_model_output = false;

    StepTable operator()(const Schedule& schedule, const Steps& steps) const;
    StepTable operator()(const EDMSchedule& schedule, const Steps& steps) const {
        return table(detail::edm_levels(schedule, steps, final_sigmas_type));
    }

   private:
    StepTable table(const NoiseLevels& levels) const;
};

/// Latent consistency models (arXiv:2310.04378, algorithm 3): `f = c_skip * x + c_out * x0`, then fresh noise at the next
/// level; the last step is f itself. A number of steps takes some of those that the model is distilled for.
struct LCM {
    static constexpr const char* name = "lcm";

    std::int64_t original_inference_steps = 50;
    /// What timesteps are multiplied by in c_skip and c_out (appendix C).
    double timestep_scaling = 10;

    StepTable operator()(const Schedule& schedule, const Steps& steps) const;
};

/// Trajectory consistency distillation (arXiv:2402.19159, algorithm 2): down to `s = floor((1 - gamma) * t_next)` on the
/// trajectory, then back up to t_next with noise. The run ends at timestep 0, as these models are trained.
struct TCD {
    static constexpr const char* name = "tcd";

    /// In [0, 1], what diffusers calls eta; 0 adds no noise, 1 is a consistency model's sampling.
    double gamma = 0.3;
    std::int64_t original_inference_steps = 50;

    StepTable operator()(const Schedule& schedule, const Steps& steps) const;
};

/// DPM-Solver++ (arXiv:2211.01095), multistep: `x_next = from_x * x + from_d * D`, D extrapolated from this x0 and the
/// previous one.
struct DPMSolver {
    static constexpr const char* name = "dpmsolver++";

    /// 1, which is DDIM in the deterministic case, or 2: 2M, algorithm 2, whose tables look back.
    std::int64_t solver_order = 2;
    /// `sde_dpmsolver` draws noise at each step (appendix D).
    AlgorithmType algorithm_type = AlgorithmType::dpmsolver;
    SolverType solver_type = SolverType::midpoint;
    /// Take the last step at first order where there are fewer than 15, with those that a strength leaves out. A step to a clean end is of first order always.
    bool lower_order_final = true;
    /// Take the last step at first order in any case.
    bool euler_at_final = false;
    FinalSigmas final_sigmas_type = FinalSigmas::zero;
    /// The least log(signal / sigma) that a number of steps starts from, for betas.
    double lambda_min_clipped = -std::numeric_limits<double>::infinity();
    /// Shift of a `FlowSchedule` that has `use_dynamic_shifting`.
    std::optional<double> mu;

    StepTable operator()(const Schedule& schedule, const Steps& steps) const;
    StepTable operator()(const FlowSchedule& schedule, const Steps& steps) const {
        require_none_of_betas("FlowSchedule");
        detail::require_unused(final_sigmas_type != FinalSigmas::zero, "final_sigmas_type", "FlowSchedule");
        return table(detail::flow_levels(schedule, steps, mu));
    }
    StepTable operator()(const EDMSchedule& schedule, const Steps& steps) const {
        detail::require_unused(mu.has_value(), "mu", "EDMSchedule");
        require_none_of_betas("EDMSchedule");
        return table(detail::edm_levels(schedule, steps, final_sigmas_type));
    }

   private:
    void require_none_of_betas(const char* schedule) const {
        detail::require_unused(std::isfinite(lambda_min_clipped), "lambda_min_clipped", schedule);
    }
    StepTable table(const NoiseLevels& levels) const;
    static std::vector<double> timesteps(const DDIMConfig& config, std::int64_t end, std::int64_t n);
};

using AnySchedule = std::variant<Schedule, FlowSchedule, EDMSchedule>;
using Method = std::variant<DDIM, DDPM, DPMSolver, Euler, EulerAncestral, LCM, TCD>;

/// What a model is sampled with.
struct Sampling {
    AnySchedule schedule;
    Method method;
    /// How a number of steps is spaced; the schedule's own by default.
    std::optional<Spacing> spacing;

    const char* method_name() const noexcept {
        return std::visit([](const auto& chosen) { return chosen.name; }, method);
    }

    /// Whether the method takes the schedule.
    bool fits() const noexcept {
        return std::visit(
            [](const auto& chosen, const auto& given) {
                return std::is_invocable_v<decltype(chosen), decltype(given), Steps>;
            },
            method, schedule);
    }

    /// The method's eta; none where it has none.
    std::optional<double> eta() const noexcept {
        Method chosen = method;
        const double* const found = eta_of(chosen);
        return found == nullptr ? std::nullopt : std::optional<double>(*found);
    }

    /// The most steps that a run can have.
    std::int64_t most_steps() const noexcept {
        if (const auto* lcm = std::get_if<LCM>(&method)) return lcm->original_inference_steps;
        if (const auto* tcd = std::get_if<TCD>(&method)) return tcd->original_inference_steps;
        if (const auto* betas = std::get_if<Schedule>(&schedule)) {
            const DDIMConfig& config = betas->config();
            const std::int64_t trained = config.num_train_timesteps;
            // Its first step lies one stride below the end of training.
            const bool below = std::holds_alternative<DPMSolver>(method) &&
                               config.timestep_spacing == TimestepSpacing::leading;
            return below ? std::max<std::int64_t>(1, trained - 1) : trained;
        }
        // EDM's models know no number of training timesteps.
        const auto* flow = std::get_if<FlowSchedule>(&schedule);
        return flow == nullptr ? 1000 : flow->num_train_timesteps;
    }

    /// The table of a run; the spacing is this one's where a number of steps has none.
    ///
    /// Throws std::invalid_argument: what the method does not take.
    StepTable build(Steps steps, std::optional<double> eta = {}) const {
        if (spacing && !steps.spacing && steps.num_inference_steps) steps.spacing = spacing;
        Method chosen = method;
        if (eta) {
            double* const own = eta_of(chosen);
            if (own == nullptr)
                throw std::invalid_argument(detail::text("eta: no option of method '", method_name(),
                                                         "'; leave it out, as 'ddim' and 'euler_ancestral' alone have it"));
            *own = *eta;
        }
        return std::visit(
            [&](const auto& made, const auto& given) -> StepTable {
                if constexpr (std::is_invocable_v<decltype(made), decltype(given), Steps>) {
                    return made(given, steps);
                } else {
                    throw std::invalid_argument(detail::text("method: '", made.name, "' does not take such a schedule; ",
                                                             "pass 'euler' or 'dpmsolver++', which take all"));
                }
            },
            chosen, schedule);
    }

   private:
    static double* eta_of(Method& method) noexcept {
        if (auto* const ddim = std::get_if<DDIM>(&method)) return &ddim->eta;
        auto* const ancestral = std::get_if<EulerAncestral>(&method);
        return ancestral == nullptr ? nullptr : &ancestral->eta;
    }
};

FASTDDIM_EXACT_BEGIN

inline StepTable DDPM::operator()(const Schedule& schedule, const Steps& steps) const {
    FASTDDIM_EXACT
    const NoiseLevels levels = detail::beta_levels(schedule, detail::transitions_of(schedule, steps, name), true);
    StepTable table = detail::begin_table(levels);
    for (std::size_t k = 0; k < levels.size(); ++k) {
        const double ratio = detail::noise_ratio(levels, k), fading = levels.signal[k] / levels.signal[k + 1];
        const double sigma_next = levels.sigma[k + 1], kept = sigma_next / levels.sigma[k];
        double noise_scale = sigma_next * std::sqrt((1.0 - ratio) * (1.0 + ratio));
        if (variance_type == VarianceType::fixed_large)
            noise_scale = k + 1 == levels.size() ? 0.0 : std::sqrt((1.0 - fading) * (1.0 + fading));
        const double from_x0 = levels.signal[k + 1] * (1.0 - ratio) * (1.0 + ratio);
        table.rows.push_back(detail::x0_row(levels, k, fading * (kept * kept), from_x0, noise_scale));
    }
    return table;
}

namespace detail {

/// The levels of diffusers' `EulerDiscreteScheduler`: timesteps may lie between those of training.
inline NoiseLevels discrete_levels(const Schedule& schedule, const Steps& steps, FinalSigmas final_sigmas_type,
                                   std::optional<double> sigma_min = {}, std::optional<double> sigma_max = {},
                                   TimestepType timestep_type = TimestepType::discrete) {
    FASTDDIM_EXACT
    steps.validate();
    const DDIMConfig& config = schedule.config();
    const TrainingSigmas training(schedule);
    std::vector<double> sigmas, timesteps = steps.timesteps.value_or(std::vector<double>{});
    if (steps.sigmas) {
        sigmas = *steps.sigmas;
        if (!steps.timesteps && !sigmas.empty()) timesteps = training.timesteps_of({sigmas.begin(), sigmas.end() - 1});
    } else {
        if (!steps.timesteps && config.timestep_spacing == TimestepSpacing::linspace) {
            timesteps = linspace(0.0, static_cast<double>(config.num_train_timesteps - 1), *steps.num_inference_steps);
            std::reverse(timesteps.begin(), timesteps.end());
        } else if (!steps.timesteps) {
            const std::vector<std::int64_t> spaced = make_timesteps(config, *steps.num_inference_steps);
            timesteps.assign(spaced.begin(), spaced.end());
        }
        sigmas = training.at(timesteps);
        if (steps.spacing) {
            const double lowest = sigma_min.value_or(sigmas.back()), highest = sigma_max.value_or(sigmas.front());
            require_number("sigma_min", lowest, 1e-10, 1e10);
            require_number("sigma_max", highest, 1e-10, 1e10);
            if (lowest > highest)
                throw std::invalid_argument(text("sigma_min, sigma_max: ", lowest, ", ", highest,
                                                 "; pass sigma_min <= sigma_max"));
            sigmas = space(*steps.spacing, *steps.num_inference_steps, lowest, highest);
            timesteps = training.timesteps_of(sigmas);
        }
        sigmas.push_back(training.last(final_sigmas_type));
    }
    if (timestep_type == TimestepType::continuous) {
        timesteps.clear();
        for (std::size_t k = 0; k + 1 < sigmas.size(); ++k) timesteps.push_back(std::log(sigmas[k]) / 4.0);
    }
    const std::size_t first = steps.first_of(timesteps.size());
    NoiseLevels levels = from_step(first, std::move(timesteps), sigmas);
    levels.prediction_type = config.prediction_type;
    // diffusers' `init_noise_sigma`.
    const bool scaled = first == 0 && (config.timestep_spacing == TimestepSpacing::linspace ||
                                       config.timestep_spacing == TimestepSpacing::trailing);
    return scaled_levels(std::move(levels), sigmas, scaled ? std::nullopt : std::optional<double>(1.0));
}

/// The levels of some of the steps of a distillation, those at its end with a `strength` below 1.
inline NoiseLevels distilled_levels(const Schedule& schedule, const Steps& steps, const char* method,
                                    std::int64_t original_inference_steps) {
    FASTDDIM_EXACT
    const std::int64_t n_train = schedule.config().num_train_timesteps;
    require_int("original_inference_steps", original_inference_steps, 1, n_train);
    if (steps.timesteps) return beta_levels(schedule, transitions_of(schedule, steps, method));
    steps.require_no_sigmas(method);
    const std::int64_t n = *steps.num_inference_steps;
    const auto left = static_cast<std::int64_t>(static_cast<double>(original_inference_steps) * steps.strength);
    if (n > left)
        throw std::invalid_argument(text("num_inference_steps: ", n, ", but the model is distilled for ",
                                         original_inference_steps, " steps, of which a strength of ", steps.strength,
                                         " leaves ", left, "; pass at most ", left, ", or original_inference_steps"));
    std::vector<std::int64_t> timesteps;
    const double apart = static_cast<double>(left) / static_cast<double>(n);
    for (std::int64_t k = 0; k < n; ++k) {
        const auto skipped = static_cast<std::int64_t>(std::floor(static_cast<double>(k) * apart));
        timesteps.push_back((left - skipped) * (n_train / original_inference_steps) - 1);
    }
    return beta_levels(schedule, schedule.transitions(timesteps));
}

/// How much to extrapolate from the previous x0, `D = x0 + extrapolation * (x0 - previous_x0)`, for a step h in lambda
/// after one of `before`; 0 where one of the two is 0 or infinite.
inline double extrapolation(double h, double before, double power, SolverType solver_type) {
    FASTDDIM_EXACT
    if (!(std::isfinite(h) && std::isfinite(before) && h > 0 && before > 0)) return 0;
    double factor = 0.5;
    if (solver_type == SolverType::heun) factor = 1.0 / -std::expm1(-power * h) - 1.0 / (power * h);
    return factor * h / before;
}

}  // namespace detail

inline StepTable Euler::operator()(const Schedule& schedule, const Steps& steps) const {
    detail::require_unused(mu.has_value(), "mu", "Schedule");
    return table(detail::discrete_levels(schedule, steps, final_sigmas_type, sigma_min, sigma_max, timestep_type));
}

inline StepTable Euler::table(const NoiseLevels& levels) const {
    return detail::make_table(levels, [&](std::size_t k) {
        const double sigma_next = levels.sigma[k + 1];
        return stochastic_sampling ? detail::x0_row(levels, k, 0, levels.signal[k + 1], sigma_next)
                                   : detail::linear_row(levels, k, sigma_next, 0, use_clipped_model_output);
    });
}

inline StepTable EulerAncestral::operator()(const Schedule& schedule, const Steps& steps) const {
    return table(detail::discrete_levels(schedule, steps, final_sigmas_type));
}

inline StepTable EulerAncestral::table(const NoiseLevels& levels) const {
    detail::require_number("eta", eta, 0, 1);
    return detail::make_table(levels, [&](std::size_t k) {
        FASTDDIM_EXACT
        // With s = sigma / signal, eta * s_next * sqrt(1 - s_next**2 / s**2) is drawn.
        const double ratio = detail::noise_ratio(levels, k);
        const double drawn = eta * std::sqrt((1.0 - ratio) * (1.0 + ratio));
        const double kept = std::sqrt((1.0 - drawn) * (1.0 + drawn)), sigma_next = levels.sigma[k + 1];
        return detail::linear_row(levels, k, sigma_next * kept, sigma_next * drawn, use_clipped_model_output);
    });
}

inline StepTable LCM::operator()(const Schedule& schedule, const Steps& steps) const {
    FASTDDIM_EXACT
    detail::require_number("timestep_scaling", timestep_scaling, 1e-6, 1e6);
    const NoiseLevels levels = detail::distilled_levels(schedule, steps, name, original_inference_steps);
    StepTable table = detail::begin_table(levels);
    for (std::size_t k = 0; k < levels.size(); ++k) {
        const bool last = k + 1 == levels.size();
        const double signal = last ? 1.0 : levels.signal[k + 1], sigma = last ? 0.0 : levels.sigma[k + 1];
        // The deviation of the data, as these models are distilled, is 0.5.
        const double scaled = levels.timesteps[k] * timestep_scaling, sum = scaled * scaled + 0.25;
        table.rows.push_back(
            detail::x0_row(levels, k, signal * (0.25 / sum), signal * (scaled / std::sqrt(sum)), sigma));
    }
    return table;
}

inline StepTable TCD::operator()(const Schedule& schedule, const Steps& steps) const {
    FASTDDIM_EXACT
    detail::require_number("gamma", gamma, 0, 1);
    NoiseLevels levels = detail::distilled_levels(schedule, steps, name, original_inference_steps);
    std::vector<double> directions, noise_scales;
    for (std::size_t k = 0; k < levels.size(); ++k) {
        const double following = k + 1 == levels.size() ? 0.0 : levels.timesteps[k + 1];
        const double alpha_bar_next = schedule.alpha_bar(static_cast<std::int64_t>(following));
        const double alpha_bar_s = schedule.alpha_bar(static_cast<std::int64_t>(std::floor((1.0 - gamma) * following)));
        // The noise lies between s and t_next, which the last step does not go back to.
        const double back = alpha_bar_next / alpha_bar_s;
        directions.push_back(std::sqrt(back * (1.0 - alpha_bar_s)));
        noise_scales.push_back(std::sqrt(1.0 - back));
        levels.signal[k + 1] = std::sqrt(alpha_bar_next);
        levels.sigma[k + 1] = std::sqrt(1.0 - alpha_bar_next);
    }
    levels = detail::checked(std::move(levels));
    StepTable table = detail::begin_table(levels);
    for (std::size_t k = 0; k < levels.size(); ++k)
        table.rows.push_back(detail::linear_row(levels, k, directions[k], noise_scales[k], false));
    return table;
}

/// The levels of diffusers' `DPMSolverMultistepScheduler`.
inline StepTable DPMSolver::operator()(const Schedule& schedule, const Steps& steps) const {
    detail::require_unused(mu.has_value(), "mu", "Schedule");
    steps.validate();
    const DDIMConfig& config = schedule.config();
    const detail::TrainingSigmas training(schedule);
    std::vector<double> sigmas, called = steps.timesteps.value_or(std::vector<double>{});
    bool float_timesteps = !std::all_of(called.begin(), called.end(), [](double t) { return t == std::floor(t); });
    if (steps.sigmas) {
        sigmas = *steps.sigmas;
        if (!steps.timesteps && !sigmas.empty()) {
            called = training.timesteps_of({sigmas.begin(), sigmas.end() - 1});
            float_timesteps = true;
        }
    } else if (steps.spacing) {
        sigmas = detail::space(*steps.spacing, *steps.num_inference_steps, training.values().front(),
                               training.values().back());
        called = training.timesteps_of(sigmas);
        // diffusers calls the model with whole numbers here.
        const bool rounded = *steps.spacing == Spacing::karras && config.beta_schedule != BetaSchedule::squaredcos_cap_v2;
        for (double& t : called) t = rounded ? std::nearbyint(t) : std::trunc(t);
        sigmas.push_back(training.last(final_sigmas_type));
    } else {
        if (!steps.timesteps) {
            const auto above = [&](double sigma) { return -std::log(sigma) >= lambda_min_clipped; };
            const auto end = std::count_if(training.values().begin(), training.values().end(), above);
            if (end == 0)
                throw std::invalid_argument(detail::text("lambda_min_clipped: ", lambda_min_clipped,
                                                         " leaves no timestep of training; pass a smaller number"));
            called = timesteps(config, end, *steps.num_inference_steps);
        }
        sigmas = training.at(called);
        sigmas.push_back(training.last(final_sigmas_type));
    }
    const std::size_t first = steps.first_of(called.size());
    NoiseLevels levels = detail::from_step(first, std::move(called), sigmas);
    levels.float_timesteps = float_timesteps;
    levels.prediction_type = config.prediction_type;
    return table(detail::scaled_levels(std::move(levels), sigmas, 1.0, true));
}

/// Descending, below `end`.
inline std::vector<double> DPMSolver::timesteps(const DDIMConfig& config, std::int64_t end, std::int64_t n) {
    FASTDDIM_EXACT
    // Of more steps some would be repeated.
    std::int64_t most = config.num_train_timesteps;
    if (config.timestep_spacing == TimestepSpacing::linspace) most = end;
    if (config.timestep_spacing == TimestepSpacing::leading) most = std::max<std::int64_t>(1, end - 1);
    detail::require_int("num_inference_steps", n, 1, most);
    std::vector<double> spaced;
    if (config.timestep_spacing == TimestepSpacing::linspace) {
        spaced = detail::linspace(0.0, static_cast<double>(end - 1), n + 1);
        std::reverse(spaced.begin(), spaced.end());
        spaced.pop_back();
        for (double& t : spaced) t = std::nearbyint(t);
    } else if (config.timestep_spacing == TimestepSpacing::leading) {
        for (std::int64_t k = n; k > 0; --k)
            spaced.push_back(static_cast<double>(k * (end / (n + 1)) + config.steps_offset));
    } else if (config.timestep_spacing == TimestepSpacing::trailing) {
        const double step = -static_cast<double>(config.num_train_timesteps) / static_cast<double>(n);
        spaced = detail::descending_to_zero(static_cast<double>(end), step);
        for (double& t : spaced) t = std::nearbyint(t) - 1.0;
        // diffusers' list has one more, -1, for some numbers of steps.
        while (spaced.back() < 0) spaced.pop_back();
    } else {
        throw std::invalid_argument(
            "timestep_spacing: 'quadratic' for method 'dpmsolver++'; pass leading, trailing or linspace");
    }
    return spaced;
}

inline StepTable DPMSolver::table(const NoiseLevels& levels) const {
    FASTDDIM_EXACT
    if (solver_order != 1 && solver_order != 2)
        throw std::invalid_argument(
            detail::text("solver_order: ", solver_order, "; pass 1 or 2, as a step has room for one previous x0"));
    StepTable made = detail::begin_table(levels);
    // Of `exp(-h)`, h the step in lambda = log(signal / sigma): the SDE takes twice the step, and adds the noise of it.
    const bool stochastic = algorithm_type == AlgorithmType::sde_dpmsolver;
    double before = std::numeric_limits<double>::infinity();
    for (std::size_t k = 0; k < levels.size(); ++k) {
        const double ratio = detail::noise_ratio(levels, k);
        const double sigma_next = levels.sigma[k + 1], kept = sigma_next / levels.sigma[k];
        double from_x = kept, from_d = levels.signal[k + 1] * (1.0 - ratio), noise_scale = 0;
        if (stochastic) {
            from_x = kept * ratio;
            from_d = levels.signal[k + 1] * ((1.0 - ratio) * (1.0 + ratio));
            noise_scale = sigma_next * std::sqrt((1.0 - ratio) * (1.0 + ratio));
        }
        const double h = -std::log(ratio);
        const bool last = k + 1 == levels.size();
        const bool first_order = solver_order == 1 || (last && (sigma_next == 0 || euler_at_final ||
                                                                (lower_order_final && levels.skipped + levels.size() < 15)));
        const double ahead = first_order ? 0.0 : detail::extrapolation(h, before, stochastic ? 2.0 : 1.0, solver_type);
        made.rows.push_back(detail::x0_row(levels, k, from_x, from_d * (1.0 + ahead), noise_scale));
        // Also where no step of a short run looks back, so that runs of all lengths are of one kind.
        if (solver_order == 2) made.next_from_previous_x0.push_back(-from_d * ahead);
        before = h;
    }
    return made;
}

FASTDDIM_EXACT_END

}  // namespace fastddim
