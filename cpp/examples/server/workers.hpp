// The queue of requests and the threads that sample them.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "fastddim/ort_sampler.hpp"
#include "picture.hpp"
#include "request.hpp"

namespace server {

/// What became of a request.
struct Outcome {
    /// `refused`: its values are at fault; `failed`: the server is.
    enum class Kind { picture, refused, failed };

    Kind kind;
    /// The PNG file, or a message.
    std::string content;
    /// The time of sampling; where requests shared a run, this one's part.
    double seconds = 0;
};

struct Job {
    std::uint64_t id = 0;
    Request request;
};

/// Jobs that wait, the oldest first.
class Queue {
   public:
    using Item = std::shared_ptr<const Job>;

    explicit Queue(std::size_t capacity) : capacity_(capacity) {}

    /// Whether there was room.
    bool push(Item job) {
        {
            const std::lock_guard lock(mutex_);
            if (jobs_.size() >= capacity_) return false;
            jobs_.push_back(std::move(job));
        }
        ready_.notify_one();
        return true;
    }

    /// Takes a job back; whether it still waited.
    bool remove(const Item& job) {
        const std::lock_guard lock(mutex_);
        const auto found = std::find(jobs_.begin(), jobs_.end(), job);
        if (found == jobs_.end()) return false;
        jobs_.erase(found);
        return true;
    }

    /// Waits for a job; it, and up to `most - 1` others that share its run. Empty: closed, and none is left.
    std::vector<Item> pop(std::size_t most) {
        std::unique_lock lock(mutex_);
        ready_.wait(lock, [&] { return closed_ || !jobs_.empty(); });
        std::vector<Item> taken;
        for (auto job = jobs_.begin(); job != jobs_.end() && taken.size() < most;) {
            if (taken.empty() || taken.front()->request.shares_run_with((*job)->request)) {
                taken.push_back(std::move(*job));
                job = jobs_.erase(job);
            } else {
                ++job;
            }
        }
        return taken;
    }

    void close() {
        {
            const std::lock_guard lock(mutex_);
            closed_ = true;
        }
        ready_.notify_all();
    }

    std::size_t size() const {
        const std::lock_guard lock(mutex_);
        return jobs_.size();
    }

   private:
    const std::size_t capacity_;
    mutable std::mutex mutex_;
    std::condition_variable ready_;
    std::deque<Item> jobs_;
    bool closed_ = false;
};

/// Threads that take jobs until the queue is closed and empty, which the destructor waits for.
class Workers {
   public:
    /// A job's id and its outcome; called by the worker, once for each job.
    using Done = std::function<void(std::uint64_t, Outcome)>;

    /// Throws std::runtime_error: the system has no room for so many threads.
    Workers(Queue& queue, const fastddim::OrtSampler& sampler, int count, std::size_t max_batch, Done done)
        : queue_(queue), sampler_(sampler), format_(sampler.bundle()), max_batch_(max_batch), done_(std::move(done)) {
        try {
            for (int k = 0; k < count; ++k) threads_.emplace_back([this] { work(); });
        } catch (const std::system_error& error) {
            stop();
            throw std::runtime_error("--workers: " + std::to_string(count) + " threads cannot be started (" +
                                     error.what() + "); pass fewer");
        }
    }

    Workers(const Workers&) = delete;
    Workers& operator=(const Workers&) = delete;

    ~Workers() { stop(); }

   private:
    void stop() {
        queue_.close();
        for (std::thread& thread : threads_) thread.join();
    }

    void work() {
        for (auto jobs = queue_.pop(max_batch_); !jobs.empty(); jobs = queue_.pop(max_batch_)) run(jobs);
    }

    void run(const std::vector<Queue::Item>& jobs) const {
        std::vector<Outcome> outcomes = sample(jobs);
        if (outcomes.size() != jobs.size()) {
            // One request may have spoilt the run of all.
            for (const Queue::Item& job : jobs) run({job});
            return;
        }
        for (std::size_t k = 0; k < jobs.size(); ++k) done_(jobs[k]->id, std::move(outcomes[k]));
    }

    /// A picture for each job, or one fault.
    std::vector<Outcome> sample(const std::vector<Queue::Item>& jobs) const {
        try {
            std::vector<Request> requests;
            for (const Queue::Item& job : jobs) requests.push_back(job->request);
            const auto start = std::chrono::steady_clock::now();
            const fastddim::Array<float> samples = sampler_(to_call(requests));
            const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
            std::vector<Outcome> outcomes;
            for (std::size_t k = 0; k < jobs.size(); ++k)
                outcomes.push_back({Outcome::Kind::picture, format_.encode(samples, k),
                                    taken.count() / static_cast<double>(jobs.size())});
            return outcomes;
        } catch (const std::invalid_argument& error) {
            return {{Outcome::Kind::refused, error.what()}};
        } catch (const Ort::Exception& error) {
            // As for a class that the model does not have: its manifest does not tell how many there are.
            if (error.GetOrtErrorCode() != ORT_INVALID_ARGUMENT) return {{Outcome::Kind::failed, error.what()}};
            std::string what = error.what();
            // The innermost of a chain of them.
            constexpr std::string_view mark = "Status Message: ";
            if (const auto cause = what.rfind(mark); cause != std::string::npos) what.erase(0, cause + mark.size());
            const std::string given = shown_conditions(jobs.front()->request);
            return {{Outcome::Kind::refused, given + "; the model does not take them (" + what + "), pass others"}};
        } catch (const std::exception& error) {
            return {{Outcome::Kind::failed, error.what()}};
        }
    }

    static std::string shown_conditions(const Request& request) {
        std::string text;
        for (const auto& [name, value] : request.conditions)
            std::visit(
                [&, &key = name](auto number) {
                    text += (text.empty() ? "" : ", ") + key + ": " + Json(number).dump();
                },
                value);
        return text;
    }

    Queue& queue_;
    const fastddim::OrtSampler& sampler_;
    const PictureFormat format_;
    const std::size_t max_batch_;
    const Done done_;
    std::vector<std::thread> threads_;
};

}  // namespace server
