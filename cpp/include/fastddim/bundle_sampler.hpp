// What the samplers of all runtimes share: a checked call becomes the file's inputs, as Python's BundleSampler has it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/call.hpp"
#include "fastddim/philox.hpp"
#include "fastddim/run_values.hpp"
#include "fastddim/schedule.hpp"

namespace fastddim {

/// The model returned NaN or an infinity; the message says at which step.
class NotFiniteError : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

namespace detail {

/// Samples with a runtime, the class `Sampler`, whose tensors are `Tensor`s. It has
///     static bool takes(const std::string& dtype);
///     static Tensor view(void* data, std::size_t bytes, const std::string& dtype, const std::vector<std::int64_t>& shape);
///     std::vector<Tensor> call(const Inputs& inputs, const std::vector<const char*>& outputs) const;
///     Array<float> to_array(const Tensor& tensor) const;
/// A view is of memory that outlives it, and that the runtime only reads.
template <class Sampler, class Tensor>
class BundleSampler {
   public:
    const Bundle& bundle() const noexcept { return bundle_; }

    /// float `[B, ...]`.
    ///
    /// Throws std::invalid_argument: arguments that the bundle does not take; NotFiniteError: with `check_finite`;
    /// BundleError: a file that returns something else than samples; and what the runtime throws.
    Array<float> operator()(const Call& call) const {
        PreparedCall ready = prepare(bundle_.manifest, call);
        Array<float> result = run(ready, ready.table);
        if (result.shape != ready.start.shape)
            throw BundleError("bundle: '" + bundle_.model_path().string() + "' returns " + shown(result.shape) +
                              " for a state " + shown(ready.start.shape) + "; export it again");
        if (check_finite_ && !is_finite(result)) throw NotFiniteError(blame(ready));
        return result;
    }

   protected:
    /// The file's inputs of one run, and their names.
    struct Inputs {
        std::vector<const char*> names;
        std::vector<Tensor> values;

        void add(const char* name, Tensor value) {
            names.push_back(name);
            values.push_back(std::move(value));
        }

        /// A view of a feed, which outlives it.
        void add(Feed& feed) {
            add(feed.name.c_str(), Sampler::view(feed.bytes.data(), feed.bytes.size(), feed.dtype, feed.shape));
        }
    };

    /// Those of a call's feeds that a graph takes.
    static Inputs view_feeds(std::vector<Feed>& feeds, const std::vector<TensorInfo>& taken) {
        Inputs inputs;
        for (Feed& feed : feeds)
            if (std::any_of(taken.begin(), taken.end(), [&](const TensorInfo& info) { return info.name == feed.name; }))
                inputs.add(feed);
        return inputs;
    }

    /// No values: a runtime that runs a graph before the steps hides this with its own.
    RunValues compute_values(PreparedCall&, const StepTable&) const { return {}; }

    /// Throws BundleError: a bundle of another runtime, or with inputs of a dtype that is not supported here.
    BundleSampler(Bundle bundle, const char* runtime, bool check_finite)
        : bundle_(std::move(bundle)), check_finite_(check_finite) {
        const Manifest& manifest = bundle_.manifest;
        if (manifest.runtime != runtime)
            throw BundleError("bundle: '" + bundle_.path.string() + "' is of runtime '" + manifest.runtime + "', not '" +
                              runtime + "'; load it with fastddim's class for that");
        std::vector<TensorInfo> inputs = manifest.inputs;
        if (manifest.before) inputs.insert(inputs.end(), manifest.before->inputs.begin(), manifest.before->inputs.end());
        for (const TensorInfo& info : inputs)
            if (!Sampler::takes(info.dtype))
                throw BundleError("bundle: '" + bundle_.model_path().string() + "' has an input '" + info.name +
                                  "' of dtype " + info.dtype + ", which fastddim's C++ loader does not take; export it with another");
    }

   private:
    const Sampler& self() const noexcept { return static_cast<const Sampler&>(*this); }

    template <class T>
    static Tensor view(std::vector<T>& values, const std::vector<std::int64_t>& shape) {
        return Sampler::view(values.data(), values.size() * sizeof(T), dtype_of<T>(), shape);
    }

    Array<float> run(PreparedCall& ready, const StepTable& table) const {
        return bundle_.manifest.kind == "loop" ? run_loop(ready, table) : run_steps(ready, table);
    }

    Array<float> run_loop(PreparedCall& ready, const StepTable& table) const {
        const auto steps = static_cast<std::int64_t>(table.size());
        std::vector<std::int64_t> count{steps};
        std::vector<unsigned char> timesteps = table.timestep_bytes();
        std::vector<float> columns = table.columns(), noise;
        Inputs inputs = view_feeds(ready.feeds, bundle_.manifest.inputs);
        if (!bundle_.manifest.sampling.seeded) inputs.add("sample", view(ready.start.values, ready.start.shape));
        if (bundle_.manifest.sampling.baked_schedule) {
            inputs.add("num_inference_steps", view(count, {}));
        } else {
            inputs.add("timesteps",
                       Sampler::view(timesteps.data(), timesteps.size(), table.timestep_dtype(), {steps}));
            inputs.add("coefficients", view(columns, {steps, static_cast<std::int64_t>(table.num_columns())}));
        }
        if (bundle_.manifest.find_input("noise") != nullptr) {
            std::vector<std::int64_t> shape{steps};
            shape.insert(shape.end(), ready.start.shape.begin(), ready.start.shape.end());
            const std::size_t size = ready.start.values.size();
            noise.resize(count_of("num_inference_steps, batch, size", shape));
            for (std::size_t step = 0; step < table.size(); ++step) draw(ready, step, noise.data() + step * size);
            inputs.add("noise", view(noise, shape));
        }
        return self().to_array(self().call(inputs, {"samples"}).front());
    }

    Array<float> run_steps(PreparedCall& ready, const StepTable& table) const {
        const std::int64_t batch = ready.start.shape[0];
        const auto samples = static_cast<std::size_t>(batch);
        const std::vector<float> columns = table.columns();
        const std::size_t width = table.num_columns();
        std::vector<unsigned char> timesteps = table.timestep_bytes(0, samples);
        std::vector<float> rows(width * samples), noise(ready.start.values.size()), zeros;
        const RunValues values = self().compute_values(ready, table);
        std::vector<std::size_t> all(samples);
        std::iota(all.begin(), all.end(), std::size_t{0});
        std::vector<Feed> kept = values.of_samples(all), of_step = values.of_steps(std::vector<std::size_t>(samples), all);
        Inputs inputs = view_feeds(ready.feeds, bundle_.manifest.inputs);
        for (std::vector<Feed>* feeds : {&kept, &of_step})
            for (Feed& feed : *feeds) inputs.add(feed);
        if (bundle_.manifest.find_input("timestep") != nullptr)
            inputs.add("timestep",
                       Sampler::view(timesteps.data(), timesteps.size(), table.timestep_dtype(), {batch}));
        inputs.add("coefficients", view(rows, {batch, static_cast<std::int64_t>(width)}));
        if (bundle_.manifest.sampling.stochastic) inputs.add("noise", view(noise, ready.start.shape));
        std::vector<const char*> outputs{"next_sample"};
        if (table.looks_back()) {
            zeros.resize(ready.start.values.size());
            inputs.add("previous_x0", view(zeros, ready.start.shape));
            outputs.push_back("pred_original_sample");
        }
        inputs.add("sample", view(ready.start.values, ready.start.shape));
        for (std::size_t step = 0; step < table.size(); ++step) {
            const std::vector<unsigned char> each = table.timestep_bytes(step, samples);
            // In place: the view is of this memory.
            std::copy(each.begin(), each.end(), timesteps.begin());
            const std::vector<Feed> now = values.of_steps(std::vector<std::size_t>(samples, step), all);
            for (std::size_t k = 0; k < now.size(); ++k)
                std::copy(now[k].bytes.begin(), now[k].bytes.end(), of_step[k].bytes.begin());
            const auto row = columns.begin() + static_cast<std::ptrdiff_t>(width * step);
            for (std::size_t k = 0; k < samples; ++k)
                std::copy(row, row + static_cast<std::ptrdiff_t>(width),
                          rows.begin() + static_cast<std::ptrdiff_t>(width * k));
            if (bundle_.manifest.sampling.stochastic) draw(ready, step, noise.data());
            // The sample's place is the last, and the previous x0's before it.
            std::vector<Tensor> results = self().call(inputs, outputs);
            if (table.looks_back()) *(inputs.values.end() - 2) = std::move(results[1]);
            inputs.values.back() = std::move(results[0]);
        }
        return self().to_array(inputs.values.back());
    }

    /// Writes a step's noise for the whole batch; leaves the zeros where the run adds none.
    static void draw(const PreparedCall& ready, std::size_t step, float* out) noexcept {
        if (!ready.noise_seeds) return;
        const std::size_t count = ready.start.values.size() / ready.noise_seeds->size();
        normal(*ready.noise_seeds, static_cast<std::uint32_t>(step), Stream::step, count, out);
    }

    static bool is_finite(const Array<float>& array) noexcept {
        return std::all_of(array.values.begin(), array.values.end(), [](float value) { return std::isfinite(value); });
    }

    /// At which step a run stopped being finite, by runs of the table's first rows.
    std::string blame(PreparedCall& ready) const {
        if (!is_finite(ready.start)) return "start: has NaN or infinite values";
        if (bundle_.manifest.sampling.baked_schedule)
            return "the result has NaN or infinite values; a bundle with a baked schedule cannot tell at which step";
        std::size_t good = 0, bad = ready.table.size();
        while (bad - good > 1) {
            const std::size_t middle = (good + bad) / 2;
            (is_finite(run(ready, ready.table.first(middle))) ? good : bad) = middle;
        }
        return text("the state has NaN or infinite values after step ", bad - 1, " (timestep ",
                            ready.table.timesteps[bad - 1], ")");
    }

    Bundle bundle_;
    bool check_finite_;
};

}  // namespace detail

}  // namespace fastddim
