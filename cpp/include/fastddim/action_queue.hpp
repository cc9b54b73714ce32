// Between a policy and a robot: the observations' history, and a chunk that is executed action by action while the next one is
// sampled, as fastddim/policies/control.py has it. For Linux, as the hand-over to the sampling thread is by POSIX semaphores.
#pragma once

#include <semaphore.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fastddim/policy_sampler.hpp"

namespace fastddim {

struct ActionQueueOptions {
    /// How many control steps before a chunk ends the next one is begun, in a thread; 0 samples it when it is needed.
    std::size_t lead = 0;
    /// With `lead`, tell the sampler which actions are executed meanwhile, for a file that takes committed actions.
    bool commit = false;
    /// Of the first chunk; the others count up.
    std::uint64_t seed = 0;
    /// Its `strength` below 1 starts each chunk but the first from the last one.
    PolicySteps steps;
};

/// One action for each control step. `act` allocates nothing and waits for nobody, but where the next chunk is late.
class ActionQueue {
   public:
    /// policy: outlives the queue, and is nobody else's meanwhile.
    ///
    /// Throws std::invalid_argument: options that do not fit.
    ActionQueue(PolicySampler& policy, const ActionQueueOptions& options)
        : policy_(policy), options_(options), whole_(policy.prepare(whole(options.steps))) {
        const Manifest::Policy& own = policy.policy();
        dim_ = static_cast<std::size_t>(own.action_dim);
        count_ = static_cast<std::size_t>(own.n_action_steps);
        first_ = static_cast<std::size_t>(own.first_action);
        if (options.lead >= count_)
            throw std::invalid_argument("lead: " + std::to_string(options.lead) + "; pass less than the " +
                                        std::to_string(count_) + " actions of a chunk");
        if (options.commit && options.lead == 0)
            throw std::invalid_argument("commit: true with lead 0, where nothing is executed meanwhile; pass lead too");
        if (options.commit && !own.committed)
            throw std::invalid_argument("commit: true, but this file takes no committed actions; export it with --committed");
        if (options.steps.strength < 1) partial_ = policy.prepare(options.steps);
        for (const Manifest::Policy::Observation& each : own.observations) {
            std::size_t size = 1;
            for (const std::int64_t side : each.shape) size *= static_cast<std::size_t>(side);
            const bool bytes = policy.bundle().manifest.find_taken(each.name)->dtype == "uint8";
            History history{each.name, size * (bytes ? 1 : sizeof(float)), bytes, {}, {}};
            history.newest.resize(history.bytes);
            history.moments.resize(history.bytes * static_cast<std::size_t>(own.n_obs_steps));
            histories_.push_back(std::move(history));
        }
        chunk_.resize(count_ * dim_);
        executed_.resize(first_ * dim_);
        known_.resize(static_cast<std::size_t>(own.horizon) * dim_);
        mask_.reset(new bool[known_.size()]);
        last_.resize(policy.samples().size);
        if (options.lead == 0) return;
        sem_init(&asked_, 0, 0);
        sem_init(&done_, 0, 0);
        worker_ = std::thread([this] { work(); });
    }

    ActionQueue(const ActionQueue&) = delete;
    ActionQueue& operator=(const ActionQueue&) = delete;

    ~ActionQueue() {
        if (!worker_.joinable()) return;
        settle();
        ends_ = true;
        sem_post(&asked_);
        worker_.join();
        sem_destroy(&asked_);
        sem_destroy(&done_);
    }

    /// Where the newest observation goes before `act`: one moment, `[*shape]`; `float`, or `std::uint8_t` for pictures of a
    /// file that takes these.
    ///
    /// Throws std::invalid_argument: a name that the policy does not know, or another type.
    template <class T>
    Span<T> observation(const std::string& name) {
        policy_.observation<T>(name);
        for (History& history : histories_)
            if (history.name == name) return {reinterpret_cast<T*>(history.newest.data()), history.bytes / sizeof(T)};
        throw std::invalid_argument(name + ": no observation of this policy");
    }

    /// Forgets observations and actions: at the begin of an episode.
    void reset() {
        settle();
        seen_ = left_ = num_executed_ = since_ = 0;
        has_last_ = false;
    }

    /// The action `[action_dim]` to execute now, for the observation that was written; it stays until the next call.
    ///
    /// Throws what the sampler throws; the queue then goes on with the next call.
    Span<const float> act() {
        see();
        if (left_ == 0) {
            const bool ahead = pending_;
            if (ahead) {
                settle();
                if (failed_) std::rethrow_exception(std::exchange(failed_, nullptr));
            } else {
                stage();
                policy_.sample(*staged_, call_);
            }
            take(ahead ? options_.lead : 0);
        }
        if (options_.lead != 0 && !pending_ && left_ == options_.lead) {
            stage();
            pending_ = true;
            sem_post(&asked_);
        }
        const float* const action = chunk_.data() + (count_ - left_) * dim_;
        --left_;
        ++since_;
        if (first_ != 0) {
            if (num_executed_ == first_) {
                std::copy(executed_.begin() + static_cast<std::ptrdiff_t>(dim_), executed_.end(), executed_.begin());
                --num_executed_;
            }
            std::copy(action, action + dim_, executed_.begin() + static_cast<std::ptrdiff_t>(num_executed_ * dim_));
            ++num_executed_;
        }
        return {action, dim_};
    }

   private:
    /// One observation's last moments, the newest last.
    struct History {
        std::string name;
        std::size_t bytes;
        bool is_bytes;
        std::vector<unsigned char> newest, moments;
    };

    static PolicySteps whole(PolicySteps steps) {
        steps.strength = 1;
        return steps;
    }

    void see() {
        for (History& history : histories_) {
            const std::size_t moments = history.moments.size() / history.bytes;
            std::memmove(history.moments.data(), history.moments.data() + history.bytes, history.bytes * (moments - 1));
            // The first observation stands for those before it.
            for (std::size_t k = seen_ == 0 ? 0 : moments - 1; k < moments; ++k)
                std::memcpy(history.moments.data() + k * history.bytes, history.newest.data(), history.bytes);
        }
        seen_ = 1;
    }

    /// What the next chunk is sampled with, in memory that is only read until it is there.
    void stage() {
        for (const History& history : histories_) {
            void* const to = history.is_bytes ? static_cast<void*>(policy_.observation<std::uint8_t>(history.name).data)
                                              : static_cast<void*>(policy_.observation<float>(history.name).data);
            std::memcpy(to, history.moments.data(), history.moments.size());
        }
        call_ = PolicyCall{};
        call_.seed = options_.seed + chunks_++;
        staged_ = &whole_;
        if (partial_ && has_last_) {
            staged_ = &*partial_;
            call_.previous = last_.data();
            call_.shift = since_;
        }
        if (options_.commit && left_ != 0) {
            std::fill(known_.begin(), known_.end(), 0.0F);
            std::fill(mask_.get(), mask_.get() + known_.size(), false);
            const std::size_t begin = (first_ - num_executed_) * dim_;
            const std::size_t executed = num_executed_ * dim_, meanwhile = left_ * dim_;
            std::copy_n(executed_.begin(), executed, known_.begin() + static_cast<std::ptrdiff_t>(begin));
            std::copy_n(chunk_.begin() + static_cast<std::ptrdiff_t>((count_ - left_) * dim_), meanwhile,
                        known_.begin() + static_cast<std::ptrdiff_t>(begin + executed));
            std::fill_n(mask_.get() + begin, executed + meanwhile, true);
            call_.known = known_.data();
            call_.mask = mask_.get();
        }
        since_ = 0;
    }

    void take(std::size_t skipped) {
        const Span<const float> actions = policy_.actions(), samples = policy_.samples();
        std::copy(actions.begin(), actions.end(), chunk_.begin());
        std::copy(samples.begin(), samples.end(), last_.begin());
        has_last_ = true;
        left_ = count_ - skipped;
    }

    /// Waits for the chunk that is being sampled, if one is.
    void settle() {
        if (!std::exchange(pending_, false)) return;
        while (sem_wait(&done_) != 0) {
        }
    }

    void work() {
        for (;;) {
            while (sem_wait(&asked_) != 0) {
            }
            if (ends_) return;
            try {
                policy_.sample(*staged_, call_);
            } catch (...) {
                failed_ = std::current_exception();
            }
            sem_post(&done_);
        }
    }

    PolicySampler& policy_;
    ActionQueueOptions options_;
    PolicySampler::Run whole_;
    std::optional<PolicySampler::Run> partial_;
    PolicySampler::Run* staged_ = nullptr;
    PolicyCall call_;
    std::vector<History> histories_;
    std::vector<float> chunk_, executed_, known_, last_;
    std::unique_ptr<bool[]> mask_;
    std::size_t dim_ = 0, count_ = 0, first_ = 0, seen_ = 0, left_ = 0, num_executed_ = 0, since_ = 0;
    std::uint64_t chunks_ = 0;
    bool has_last_ = false, pending_ = false;
    // Handed over by the semaphores, which order what is written before them.
    bool ends_ = false;
    std::exception_ptr failed_;
    sem_t asked_{}, done_{};
    std::thread worker_;
};

}  // namespace fastddim
