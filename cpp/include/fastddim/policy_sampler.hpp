// A robot policy's file with ONNX Runtime: observations in, actions out, over buffers that are allocated once, as
// fastddim/export/policy_sampler.py has it. After a run is prepared, sampling allocates nothing and takes no lock of ours.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/call.hpp"
#include "fastddim/philox.hpp"
#include "fastddim/samplers.hpp"

namespace fastddim {

/// Memory that somebody else owns.
template <class T>
struct Span {
    T* data = nullptr;
    std::size_t size = 0;

    T* begin() const noexcept { return data; }
    T* end() const noexcept { return data + size; }
    T& operator[](std::size_t k) const noexcept { return data[k]; }
};

/// Which steps a run takes; the bundle's own by default.
struct PolicySteps {
    std::optional<std::int64_t> num_inference_steps;
    /// Few steps of DDIM for a policy that is sampled by DDPM; the network's own epsilon where x0 is limited.
    bool ddim = false;
    std::optional<double> eta;
    /// Below 1 the run starts from the last chunk, noised this far, in as many fewer steps.
    double strength = 1;
};

/// What one chunk is sampled with.
struct PolicyCall {
    std::uint64_t seed = 0;
    /// The start, standard normal `[horizon, state_dim]`, instead of what the seed draws.
    const float* noise = nullptr;
    /// For a run of `strength` below 1: the last chunk's samples, normalised `[horizon, state_dim]`, from `shift` control
    /// steps on; the last moment is repeated.
    const float* previous = nullptr;
    std::size_t shift = 0;
    /// Of a file that takes committed actions: in the robot's units `[horizon, action_dim]`, and which of them are known.
    const float* known = nullptr;
    const bool* mask = nullptr;
    /// For a file of one step: once it has passed, the next finished step ends the run, and its x0 is the result.
    std::optional<std::chrono::steady_clock::time_point> deadline;
};

/// Samples chunks of actions, one robot's at a time; a thread has one sampler of its own.
///
///     PolicySampler policy(open_bundle("policy"));
///     PolicySampler::Run run = policy.prepare({});
///     Span<float> state = policy.observation<float>("observation.state");   // [n_obs_steps, n], the newest last
///     ... write the observations ...
///     policy.sample(run, {seed});
///     policy.actions()                                                        // [n_action_steps, action_dim]
class PolicySampler {
   public:
    /// A run's steps with their tables and bindings. It belongs to the sampler that made it, which outlives it.
    class Run {
       public:
        std::size_t num_steps() const noexcept { return table_.size(); }

       private:
        friend class PolicySampler;
        explicit Run(StepTable table) : table_(std::move(table)) {}

        StepTable table_;
        bool partial_ = false;
        std::vector<unsigned char> timesteps_;
        std::vector<float> columns_;
        std::vector<std::vector<float>> values_;
        std::vector<Ort::IoBinding> bindings_;
        std::unique_ptr<Ort::IoBinding> before_;
    };

    /// bundle: what `open_bundle` gives for a folder that `export_policy` wrote, of runtime `onnx`.
    ///
    /// Throws BundleError: another bundle, or one that ONNX Runtime cannot load.
    explicit PolicySampler(Bundle bundle, const Ort::SessionOptions& options = Ort::SessionOptions{})
        : bundle_(std::move(bundle)), environment_(ORT_LOGGING_LEVEL_WARNING, "fastddim") {
        const std::string shown = "bundle: '" + bundle_.path.string() + "' ";
        const Manifest& manifest = bundle_.manifest;
        if (!manifest.policy) throw BundleError(shown + "is no policy's; load it with fastddim::OrtSampler");
        if (manifest.runtime != "onnx") throw BundleError(shown + "is of runtime '" + manifest.runtime + "'; export it for ONNX");
        if (manifest.sampling.seeded || manifest.sampling.baked_schedule || !manifest.scheduling)
            throw BundleError(shown + "has its schedule or noise inside; export it without --seeded and --bake-schedule");
        session_ = load(bundle_.model_path(), options);
        if (manifest.before) before_ = load(bundle_.before_path(), options);
        const Manifest::Policy& policy = *manifest.policy;
        for (const Manifest::Policy::Observation& observation : policy.observations) {
            const TensorInfo* const info = manifest.find_taken(observation.name);
            if (info == nullptr) throw BundleError(shown + "has no input '" + observation.name + "'; export it again");
            buffers_[observation.name] = Buffer(*info);
        }
        if (policy.committed)
            for (const char* name : {"known", "mask", "known_noise"}) {
                Buffer& buffer = buffers_[name] = Buffer(*manifest.find_taken(name));
                committed_.push_back(&buffer.bytes);
            }
        for (const Manifest::Policy::Observation& observation : policy.observations)
            observed_.push_back(&buffers_.at(observation.name));
        const std::size_t state = static_cast<std::size_t>(manifest.sample.shape.at(0) * manifest.sample.shape.at(1));
        width_ = static_cast<std::size_t>(manifest.sample.shape[1]);
        for (std::vector<float>* each : {&noise_, &states_[0], &states_[1], &x0_[0], &x0_[1], &start_}) each->resize(state);
        const auto actions = static_cast<std::size_t>(policy.n_action_steps * policy.action_dim);
        actions_.resize(actions);
        normalised_.resize(actions);
    }

    PolicySampler(const PolicySampler&) = delete;
    PolicySampler& operator=(const PolicySampler&) = delete;

    const Bundle& bundle() const noexcept { return bundle_; }
    const Manifest::Policy& policy() const noexcept { return *bundle_.manifest.policy; }

    /// Where an observation goes before a call: `[n_obs_steps, *shape]`, the newest last; `float`, or `std::uint8_t` for the
    /// pictures of a file that takes these. It stays where it is.
    ///
    /// Throws std::invalid_argument: a name that the policy does not know, or another type.
    template <class T>
    Span<T> observation(const std::string& name) {
        std::string known;
        for (const Manifest::Policy::Observation& each : policy().observations) {
            known += (known.empty() ? "" : ", ") + each.name;
            if (each.name != name) continue;
            Buffer& buffer = buffers_.at(name);
            const char* const wanted = std::is_same_v<T, std::uint8_t> ? "uint8" : "float32";
            if (buffer.dtype != wanted)
                throw std::invalid_argument(name + ": " + wanted + "; this file takes " + buffer.dtype);
            return {reinterpret_cast<T*>(buffer.bytes.data()), buffer.bytes.size() / sizeof(T)};
        }
        throw std::invalid_argument(name + ": no observation of this policy, which takes " + known);
    }

    /// Makes the tables and bindings of a run; not for a control loop's hot path.
    ///
    /// Throws std::invalid_argument: steps that the policy does not take.
    Run prepare(const PolicySteps& steps) {
        const Manifest& manifest = bundle_.manifest;
        Sampling scheduling = *manifest.scheduling;
        if (steps.ddim) scheduling.method = DDIM{};
        Steps taken(steps.num_inference_steps.value_or(static_cast<std::int64_t>(manifest.table.size())));
        taken.strength = steps.strength;
        Run run(detail::fit_table(manifest, scheduling.build(taken, steps.eta), "eta: its steps add noise"));
        run.partial_ = steps.strength < 1;
        if (run.partial_ && !run.table_.noising)
            throw std::invalid_argument("strength: this policy's method has no noising rule; pass 1");
        run.timesteps_ = run.table_.timestep_bytes();
        run.columns_ = run.table_.columns();
        manifest.kind == "loop" ? bind_loop(run) : bind_steps(run);
        return run;
    }

    /// Samples a chunk: `actions`, `normalised` and `samples` then have it.
    ///
    /// Throws std::invalid_argument: observations that are not finite, or arguments that the file does not take, before the
    /// network runs; Ort::Exception: what ONNX Runtime throws.
    void sample(Run& run, const PolicyCall& call) {
        check(run, call);
        const std::size_t size = noise_.size();
        if (call.noise != nullptr) {
            std::copy(call.noise, call.noise + size, noise_.begin());
        } else {
            normal(call.seed, 0, Stream::initial, size, noise_.data());
        }
        fill_start(run, call);
        fill_known(call);
        const bool noisy = run.table_.stochastic();
        if (bundle_.manifest.kind == "loop") {
            for (std::size_t step = 0; noisy && step < run.num_steps(); ++step)
                normal(call.seed, static_cast<std::uint32_t>(step), Stream::step, size, run.values_[0].data() + step * size);
            session_.Run(run_options_, run.bindings_[0]);
            last_ = 0;
            return;
        }
        if (run.before_) before_.Run(run_options_, *run.before_);
        for (std::size_t step = 0; step < run.num_steps(); ++step) {
            if (noisy) normal(call.seed, static_cast<std::uint32_t>(step), Stream::step, size, step_noise_.data());
            session_.Run(run_options_, run.bindings_[step]);
            last_ = (step + 1) % 2;
            if (call.deadline && std::chrono::steady_clock::now() >= *call.deadline) break;
        }
    }

    /// `[n_action_steps, action_dim]`: what to execute, in the robot's units.
    Span<const float> actions() const noexcept { return {actions_.data(), actions_.size()}; }
    /// The same as the network has them.
    Span<const float> normalised() const noexcept { return {normalised_.data(), normalised_.size()}; }
    /// `[horizon, state_dim]`: all that was sampled, normalised.
    Span<const float> samples() const noexcept { return {x0_[last_].data(), x0_[last_].size()}; }

   private:
    /// An input's memory, for one sample.
    struct Buffer {
        Buffer() = default;
        explicit Buffer(const TensorInfo& info) : dtype(info.dtype) {
            std::size_t count = 1;
            for (const Dim& dim : info.shape) {
                shape.push_back(dim.fixed() ? dim.size : 1);
                count *= static_cast<std::size_t>(shape.back());
            }
            bytes.resize(count * (dtype == "float32" ? 4 : 1));
        }

        std::string dtype;
        std::vector<std::int64_t> shape;
        std::vector<unsigned char> bytes;
    };

    Ort::Session load(const std::filesystem::path& path, const Ort::SessionOptions& options) const {
        try {
            return Ort::Session(environment_, path.c_str(), options);
        } catch (const Ort::Exception& error) {
            throw BundleError("bundle: '" + path.string() + "' cannot be loaded: " + error.what() +
                              "; export it again, or update ONNX Runtime");
        }
    }

    static Ort::Value view(void* data, std::size_t bytes, const std::string& dtype, const std::vector<std::int64_t>& shape) {
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        const auto type = dtype == "float32" ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                          : dtype == "int64" ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
                          : dtype == "uint8" ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
                                             : ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
        return Ort::Value::CreateTensor(memory, data, bytes, shape.data(), shape.size(), type);
    }

    static Ort::Value view(std::vector<float>& values, const std::vector<std::int64_t>& shape) {
        return view(values.data(), values.size() * sizeof(float), "float32", shape);
    }

    std::vector<std::int64_t> state_shape() const {
        return {1, bundle_.manifest.sample.shape[0], bundle_.manifest.sample.shape[1]};
    }

    /// Binds those of the buffers that a graph takes.
    void bind_buffers(Ort::IoBinding& binding, const std::vector<TensorInfo>& taken) {
        for (auto& [name, buffer] : buffers_)
            if (std::any_of(taken.begin(), taken.end(), [&, &key = name](const TensorInfo& info) { return info.name == key; }))
                binding.BindInput(name.c_str(), view(buffer.bytes.data(), buffer.bytes.size(), buffer.dtype, buffer.shape));
    }

    void bind_actions(Ort::IoBinding& binding) {
        const Manifest::Policy& own = policy();
        const std::vector<std::int64_t> shape{1, own.n_action_steps, own.action_dim};
        binding.BindOutput("actions", view(actions_, shape));
        binding.BindOutput("normalised", view(normalised_, shape));
    }

    void bind_loop(Run& run) {
        const auto steps = static_cast<std::int64_t>(run.num_steps());
        Ort::IoBinding binding(session_);
        bind_buffers(binding, bundle_.manifest.inputs);
        binding.BindInput("sample", view(start_, state_shape()));
        binding.BindInput("timesteps", view(run.timesteps_.data(), run.timesteps_.size(), run.table_.timestep_dtype(), {steps}));
        binding.BindInput("coefficients", view(run.columns_, {steps, static_cast<std::int64_t>(run.table_.num_columns())}));
        if (bundle_.manifest.find_input("noise") != nullptr) {
            std::vector<std::int64_t> shape = state_shape();
            shape.insert(shape.begin(), steps);
            run.values_.emplace_back(run.num_steps() * noise_.size());
            binding.BindInput("noise", view(run.values_[0], shape));
        }
        binding.BindOutput("samples", view(x0_[0], state_shape()));
        bind_actions(binding);
        run.bindings_.push_back(std::move(binding));
    }

    /// One binding for each step, which take the states in turn, so that nothing is bound while a run is under way.
    void bind_steps(Run& run) {
        const Manifest& manifest = bundle_.manifest;
        const auto steps = static_cast<std::int64_t>(run.num_steps());
        const std::size_t each = run.timesteps_.size() / run.num_steps(), columns = run.table_.num_columns();
        step_noise_.assign(noise_.size(), 0.0F);
        if (manifest.before) {
            run.before_ = std::make_unique<Ort::IoBinding>(before_);
            bind_buffers(*run.before_, manifest.before->inputs);
            for (const TensorInfo& info : manifest.before->inputs)
                if (info.name == "timesteps")
                    run.before_->BindInput("timesteps", view(run.timesteps_.data(), run.timesteps_.size(),
                                                             run.table_.timestep_dtype(), {steps}));
            for (const TensorInfo& info : manifest.before->outputs) {
                std::vector<std::int64_t> shape = shape_of(info, steps);
                std::size_t count = 1;
                for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
                run.values_.emplace_back(count);
                run.before_->BindOutput(info.name.c_str(), view(run.values_.back(), shape));
            }
        }
        for (std::size_t step = 0; step < run.num_steps(); ++step) {
            Ort::IoBinding binding(session_);
            bind_buffers(binding, manifest.inputs);
            binding.BindInput("sample", view(step == 0 ? start_ : states_[step % 2], state_shape()));
            if (manifest.find_input("timestep") != nullptr)
                binding.BindInput("timestep", view(run.timesteps_.data() + step * each, each, run.table_.timestep_dtype(), {1}));
            binding.BindInput("coefficients", view(run.columns_.data() + step * columns, columns * sizeof(float), "float32",
                                                   {1, static_cast<std::int64_t>(columns)}));
            if (run.table_.looks_back()) binding.BindInput("previous_x0", view(x0_[step % 2], state_shape()));
            if (manifest.find_input("noise") != nullptr) binding.BindInput("noise", view(step_noise_, state_shape()));
            for (std::size_t k = 0; manifest.before && k < manifest.before->outputs.size(); ++k) {
                const TensorInfo& info = manifest.before->outputs[k];
                std::vector<std::int64_t> shape = shape_of(info, steps);
                std::vector<float>& values = run.values_[k];
                // A row for each step, or the same for all of them.
                const bool by_step = info.shape[0].name == "steps";
                const std::size_t row = by_step ? values.size() / run.num_steps() : values.size();
                if (by_step) shape.erase(shape.begin());
                const std::vector<std::int64_t> taken = shape_of(*manifest.find_input(info.name), steps);
                binding.BindInput(info.name.c_str(), view(values.data() + (by_step ? step * row : 0), row * sizeof(float),
                                                          "float32", taken));
            }
            binding.BindOutput("next_sample", view(states_[(step + 1) % 2], state_shape()));
            binding.BindOutput("pred_original_sample", view(x0_[(step + 1) % 2], state_shape()));
            bind_actions(binding);
            run.bindings_.push_back(std::move(binding));
        }
    }

    static std::vector<std::int64_t> shape_of(const TensorInfo& info, std::int64_t steps) {
        std::vector<std::int64_t> shape;
        for (const Dim& dim : info.shape) shape.push_back(dim.fixed() ? dim.size : dim.name == "steps" ? steps : 1);
        return shape;
    }

    void check(const Run& run, const PolicyCall& call) const {
        for (std::size_t index = 0; index < observed_.size(); ++index) {
            const Manifest::Policy::Observation& each = policy().observations[index];
            const Buffer& buffer = *observed_[index];
            if (buffer.dtype != "float32") continue;
            const auto* const values = reinterpret_cast<const float*>(buffer.bytes.data());
            const std::size_t count = buffer.bytes.size() / sizeof(float);
            for (std::size_t k = 0; k < count; ++k) {
                if (!std::isfinite(values[k]))
                    throw std::invalid_argument(each.name + ": has NaN or infinite values; repeat the last observation");
                if (each.image && !(values[k] >= 0 && values[k] <= 1))
                    throw std::invalid_argument(each.name + ": has pixels outside [0, 1]; divide by 255");
            }
        }
        if (run.partial_ != (call.previous != nullptr))
            throw std::invalid_argument(run.partial_ ? "previous: missing for a run of strength below 1; pass the last chunk"
                                                     : "previous: given for a whole run; prepare one of strength below 1");
        if ((call.known == nullptr) != (call.mask == nullptr))
            throw std::invalid_argument("known, mask: one of the two; pass both, or none");
        if (call.known != nullptr && !policy().committed)
            throw std::invalid_argument("known, mask: this file takes none; export it with --committed");
        if (call.deadline && bundle_.manifest.kind == "loop")
            throw std::invalid_argument("deadline: given for a file that takes all steps at once; export it with --kind step");
        for (std::size_t k = 0; call.noise != nullptr && k < noise_.size(); ++k)
            if (!std::isfinite(call.noise[k])) throw std::invalid_argument("noise: has NaN or infinite values");
    }

    void fill_start(const Run& run, const PolicyCall& call) {
        const std::size_t horizon = noise_.size() / width_;
        if (!run.partial_) {
            const auto scale = call.noise == nullptr ? static_cast<float>(run.table_.start_scale) : 1.0F;
            for (std::size_t k = 0; k < noise_.size(); ++k) start_[k] = noise_[k] * scale;
            return;
        }
        const auto from_x0 = static_cast<float>((*run.table_.noising)[0]);
        const auto from_noise = static_cast<float>((*run.table_.noising)[1]);
        // It may be the last result, which is another memory than the start's.
        for (std::size_t moment = 0; moment < horizon; ++moment) {
            const float* const from = call.previous + std::min(moment + call.shift, horizon - 1) * width_;
            for (std::size_t k = 0; k < width_; ++k) {
                const std::size_t at = moment * width_ + k;
                start_[at] = from[k] * from_x0 + noise_[at] * from_noise;
            }
        }
    }

    void fill_known(const PolicyCall& call) {
        if (!policy().committed) return;
        const auto dim = static_cast<std::size_t>(policy().action_dim);
        auto* const known = reinterpret_cast<float*>(committed_[0]->data());
        auto* const mask = committed_[1]->data();
        auto* const noise = reinterpret_cast<float*>(committed_[2]->data());
        const std::size_t count = committed_[1]->size();
        for (std::size_t k = 0; k < count; ++k) {
            const bool is_known = call.mask != nullptr && call.mask[k];
            if (is_known && !std::isfinite(call.known[k]))
                throw std::invalid_argument("known: has NaN or infinite values where mask is true");
            mask[k] = is_known ? 1 : 0;
            known[k] = is_known ? call.known[k] : 0.0F;
            noise[k] = noise_[k / dim * width_ + k % dim];
        }
    }

    Bundle bundle_;
    Ort::Env environment_;
    Ort::Session session_{nullptr}, before_{nullptr};
    Ort::RunOptions run_options_;
    std::map<std::string, Buffer> buffers_;
    std::vector<const Buffer*> observed_;
    // Those of known, mask and known_noise, where the file takes them.
    std::vector<std::vector<unsigned char>*> committed_;
    std::size_t width_ = 0;
    // Which of the two has the samples.
    std::size_t last_ = 0;
    std::vector<float> noise_, start_, step_noise_, actions_, normalised_;
    std::vector<float> states_[2], x0_[2];
};

}  // namespace fastddim
