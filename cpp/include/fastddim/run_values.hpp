// What a step file's second graph computed for all steps of a run, and its rows for a step of any of the samples, as
// fastddim/export/run_values.py has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fastddim/bundle.hpp"
#include "fastddim/call.hpp"

namespace fastddim {

/// What was computed before the steps of a run. A step takes any of its samples, each at a step of its own: `of_steps` and
/// `of_samples` are its inputs. None where nothing was. Nothing here changes, so several threads may take rows at a time.
class RunValues {
   public:
    RunValues() = default;

    /// values: the graph's outputs, in the order of their descriptions, which name the dimensions: "steps", the first one,
    /// has a row for each step, and "batch" one for each sample.
    ///
    /// Throws std::invalid_argument: a value of another shape or size.
    RunValues(std::vector<Feed> values, const std::vector<TensorInfo>& described, std::int64_t steps, std::int64_t batch)
        : steps_(static_cast<std::size_t>(steps)), batch_(static_cast<std::size_t>(batch)) {
        if (values.size() != described.size())
            throw std::invalid_argument(detail::text("values: ", values.size(), "; pass ", described.size()));
        for (std::size_t k = 0; k < values.size(); ++k) values_.emplace_back(std::move(values[k]), described[k], *this);
    }

    /// The inputs of a step that change from step to step: for each of its samples the step, from 0, and the sample's
    /// number in the run. Throws std::out_of_range: what the run does not have.
    std::vector<Feed> of_steps(const std::vector<std::size_t>& steps, const std::vector<std::size_t>& samples) const {
        if (steps.size() != samples.size()) throw std::out_of_range("steps, samples: pass as many of both");
        return rows(true, steps, samples);
    }

    /// The inputs of a step that stay the same in all steps.
    std::vector<Feed> of_samples(const std::vector<std::size_t>& samples) const {
        return rows(false, std::vector<std::size_t>(samples.size()), samples);
    }

   private:
    struct Value {
        Value(Feed given, const TensorInfo& info, const RunValues& run) : feed(std::move(given)) {
            const bool same_rank = feed.shape.size() == info.shape.size();
            std::size_t* part = &outer;
            std::size_t count = 1;
            for (std::size_t k = 0; k < info.shape.size() && same_rank; ++k) {
                const Dim& dim = info.shape[k];
                const auto size = static_cast<std::size_t>(feed.shape[k]);
                const bool is_step = dim.name == "steps", is_sample = dim.name == "batch";
                if (size != (is_step ? run.steps_ : is_sample ? run.batch_ : static_cast<std::size_t>(dim.size)))
                    count = 0;
                count *= size;
                of_step = of_step || is_step;
                if (is_sample) {
                    batch_dim = k;
                    part = &inner;
                } else if (!is_step) {
                    *part *= size;
                }
            }
            const bool whole = same_rank && count > 0 && feed.bytes.size() % count == 0;
            if (!whole)
                throw std::invalid_argument(detail::text(info.name, ": shape ", detail::shown(feed.shape), " with ",
                                                         feed.bytes.size(), " bytes; pass ", detail::shown(info.shape),
                                                         " of ", run.steps_, " steps and ", run.batch_, " samples"));
            inner *= feed.bytes.size() / count;
            // Without a batch of its own, a step's row is each sample's.
            if (!has_batch()) inner *= std::exchange(outer, 1);
        }

        bool has_batch() const noexcept { return batch_dim < feed.shape.size(); }

        Feed feed;
        bool of_step = false;
        /// The batch's dimension; past the last one there is none.
        std::size_t batch_dim = static_cast<std::size_t>(-1);
        /// How many parts of a step the sizes before the batch make, and the bytes of each sample's entry in one.
        std::size_t outer = 1, inner = 1;
    };

    std::vector<Feed> rows(bool of_step, const std::vector<std::size_t>& steps,
                           const std::vector<std::size_t>& samples) const {
        if (values_.empty()) return {};
        for (std::size_t k = 0; k < samples.size(); ++k)
            if (samples[k] >= batch_ || steps[k] >= steps_)
                throw std::out_of_range(detail::text("step ", steps[k], " of sample ", samples[k], "; the run has ",
                                                     steps_, " steps and ", batch_, " samples"));
        std::vector<Feed> feeds;
        for (const Value& value : values_)
            if (value.of_step == of_step) feeds.push_back(gather(value, steps, samples));
        return feeds;
    }

    Feed gather(const Value& value, const std::vector<std::size_t>& steps,
                const std::vector<std::size_t>& samples) const {
        if (!value.of_step && !value.has_batch()) return value.feed;
        Feed taken{value.feed.name, value.feed.dtype, value.feed.shape, {}};
        const bool has_batch = value.has_batch();
        taken.shape[has_batch ? value.batch_dim : 0] = static_cast<std::int64_t>(samples.size());
        if (value.of_step && has_batch) taken.shape.erase(taken.shape.begin());
        taken.bytes.reserve(value.outer * samples.size() * value.inner);
        for (std::size_t part = 0; part < value.outer; ++part)
            for (std::size_t k = 0; k < samples.size(); ++k) {
                const std::size_t place = steps[k] * value.outer + part;
                const std::size_t row = has_batch ? place * batch_ + samples[k] : place;
                const auto begin = value.feed.bytes.begin() + static_cast<std::ptrdiff_t>(row * value.inner);
                taken.bytes.insert(taken.bytes.end(), begin, begin + static_cast<std::ptrdiff_t>(value.inner));
            }
        return taken;
    }

    std::size_t steps_ = 0, batch_ = 0;
    std::vector<Value> values_;
};

}  // namespace fastddim
