// Running a bundle with ONNX Runtime: the same seeds give the same samples as Python's, to float rounding.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/call.hpp"
#include "fastddim/philox.hpp"
#include "fastddim/schedule.hpp"

namespace fastddim {

/// The model returned NaN or an infinity; the message says at which step.
class NotFiniteError : public std::runtime_error {
   public:
    using std::runtime_error::runtime_error;
};

/// Samples from a bundle. A call changes nothing in it, so several threads may call one sampler at a time.
class OrtSampler {
   public:
    /// bundle: of `open_bundle`.
    /// options: ONNX Runtime's, for threads and execution providers.
    /// check_finite: look for NaN and infinities in results, and find the step at which they appeared.
    ///
    /// Throws BundleError: ONNX Runtime cannot load the graph, or it has inputs of a dtype that is not supported here.
    explicit OrtSampler(Bundle bundle, const Ort::SessionOptions& options = Ort::SessionOptions{},
                        bool check_finite = false)
        : bundle_(std::move(bundle)),
          schedule_(bundle_.manifest.schedule),
          environment_(ORT_LOGGING_LEVEL_WARNING, "fastddim"),
          session_(load(environment_, bundle_, options)),
          check_finite_(check_finite) {
        for (const TensorInfo& info : bundle_.manifest.inputs)
            if (type_of(info.dtype) == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED)
                throw BundleError("bundle: '" + bundle_.model_path().string() + "' has an input '" + info.name +
                                  "' of dtype " + info.dtype + ", which fastddim's C++ loader does not take");
    }

    const Bundle& bundle() const noexcept { return bundle_; }

    /// float `[B, ...]`.
    ///
    /// Throws std::invalid_argument: arguments that the bundle does not take; NotFiniteError: with `check_finite`;
    /// Ort::Exception: what ONNX Runtime throws.
    Array<float> operator()(const Call& call) const {
        PreparedCall ready = prepare(bundle_.manifest, schedule_, call);
        Array<float> result = run(ready, ready.table);
        if (check_finite_ && !is_finite(result)) throw NotFiniteError(blame(ready));
        return result;
    }

   private:
    /// The graph's inputs of one run: their names, and tensors over memory that outlives them.
    struct Inputs {
        std::vector<const char*> names;
        std::vector<Ort::Value> values;

        void add(const char* name, Ort::Value value) {
            names.push_back(name);
            values.push_back(std::move(value));
        }
    };

    static Ort::Session load(const Ort::Env& environment, const Bundle& bundle, const Ort::SessionOptions& options) {
        try {
            return Ort::Session(environment, bundle.model_path().c_str(), options);
        } catch (const Ort::Exception& error) {
            throw BundleError("bundle: '" + bundle.model_path().string() + "' cannot be loaded: " + error.what());
        }
    }

    static ONNXTensorElementDataType type_of(const std::string& dtype) noexcept {
        if (dtype == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        if (dtype == "float64") return ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
        if (dtype == "int64") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
        if (dtype == "int32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        if (dtype == "uint8") return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        if (dtype == "bool") return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
        if (dtype == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    }

    /// A tensor over a vector's memory, which ONNX Runtime only reads.
    template <class T>
    static Ort::Value view(std::vector<T>& values, const std::vector<std::int64_t>& shape) {
        return Ort::Value::CreateTensor<T>(cpu(), values.data(), values.size(), shape.data(), shape.size());
    }

    static Ort::MemoryInfo cpu() { return Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault); }

    static Inputs view_feeds(std::vector<Feed>& feeds) {
        Inputs inputs;
        for (Feed& feed : feeds)
            inputs.add(feed.name.c_str(),
                       Ort::Value::CreateTensor(cpu(), feed.bytes.data(), feed.bytes.size(), feed.shape.data(),
                                                feed.shape.size(), type_of(feed.dtype)));
        return inputs;
    }

    Array<float> run(PreparedCall& ready, const StepTable& table) const {
        return bundle_.manifest.graph == "loop" ? run_loop(ready, table) : run_steps(ready, table);
    }

    Array<float> run_loop(PreparedCall& ready, const StepTable& table) const {
        const auto steps = static_cast<std::int64_t>(table.size());
        std::vector<std::int64_t> count{steps}, timesteps = table.timesteps;
        std::vector<float> columns = table.columns(), noise;
        Inputs inputs = view_feeds(ready.feeds);
        inputs.add("sample", view(ready.start.values, ready.start.shape));
        if (bundle_.manifest.sampling.baked_schedule) {
            inputs.add("num_inference_steps", view(count, {}));
        } else {
            inputs.add("timesteps", view(timesteps, {steps}));
            inputs.add("coefficients", view(columns, {steps, 6}));
        }
        if (bundle_.manifest.sampling.stochastic) {
            std::vector<std::int64_t> shape{steps};
            shape.insert(shape.end(), ready.start.shape.begin(), ready.start.shape.end());
            const std::size_t size = ready.start.values.size();
            noise.resize(detail::count_of("num_inference_steps, batch, size", shape));
            for (std::size_t step = 0; step < table.size(); ++step) draw(ready, step, noise.data() + step * size);
            inputs.add("noise", view(noise, shape));
        }
        return to_array(call(inputs, "samples"));
    }

    Array<float> run_steps(PreparedCall& ready, const StepTable& table) const {
        const std::int64_t batch = ready.start.shape[0];
        const auto samples = static_cast<std::size_t>(batch);
        const std::vector<float> columns = table.columns();
        std::vector<std::int64_t> timesteps(samples);
        std::vector<float> rows(6 * samples), noise(ready.start.values.size());
        Inputs inputs = view_feeds(ready.feeds);
        inputs.add("timestep", view(timesteps, {batch}));
        inputs.add("coefficients", view(rows, {batch, 6}));
        if (bundle_.manifest.sampling.stochastic) inputs.add("noise", view(noise, ready.start.shape));
        inputs.add("sample", view(ready.start.values, ready.start.shape));
        for (std::size_t step = 0; step < table.size(); ++step) {
            std::fill(timesteps.begin(), timesteps.end(), table.timesteps[step]);
            const auto row = columns.begin() + static_cast<std::ptrdiff_t>(6 * step);
            for (std::size_t k = 0; k < samples; ++k)
                std::copy(row, row + 6, rows.begin() + static_cast<std::ptrdiff_t>(6 * k));
            if (bundle_.manifest.sampling.stochastic) draw(ready, step, noise.data());
            inputs.values.back() = call(inputs, "next_sample");
        }
        return to_array(inputs.values.back());
    }

    /// Writes a step's noise for the whole batch; leaves the zeros where the run adds none.
    static void draw(const PreparedCall& ready, std::size_t step, float* out) noexcept {
        if (!ready.noise_seeds) return;
        const std::size_t count = ready.start.values.size() / ready.noise_seeds->size();
        normal(*ready.noise_seeds, static_cast<std::uint32_t>(step), Stream::step, count, out);
    }

    Ort::Value call(const Inputs& inputs, const char* output) const {
        Ort::Value result{nullptr};
        session_.Run(Ort::RunOptions{nullptr}, inputs.names.data(), inputs.values.data(), inputs.values.size(), &output,
                     &result, 1);
        return result;
    }

    Array<float> to_array(const Ort::Value& value) const {
        const Ort::TensorTypeAndShapeInfo info = value.GetTensorTypeAndShapeInfo();
        if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
            throw BundleError("bundle: '" + bundle_.model_path().string() + "' returns no float32; export it again");
        const float* values = value.GetTensorData<float>();
        return {info.GetShape(), {values, values + info.GetElementCount()}};
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
        return detail::text("the state has NaN or infinite values after step ", bad - 1, " (timestep ",
                            ready.table.timesteps[bad - 1], ")");
    }

    Bundle bundle_;
    Schedule schedule_;
    Ort::Env environment_;
    // ONNX Runtime's sessions run on several threads at a time; its C++ class has no const Run.
    mutable Ort::Session session_;
    bool check_finite_;
};

}  // namespace fastddim
