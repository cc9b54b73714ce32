// HTTP on one thread, with Boost.Beast: connections, their limits and time-outs, and what each path answers.
#pragma once

#include <algorithm>
#include <array>
#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <iomanip>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "metrics.hpp"
#include "request.hpp"
#include "settings.hpp"
#include "workers.hpp"

namespace server {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;

using Response = http::response<http::string_body>;
using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Writes a line with the time to the standard error.
inline void log(const std::string& line) {
    const auto now = std::chrono::system_clock::now();
    const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
    const auto part = std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count() % 1000;
    std::tm parts{};
    gmtime_r(&seconds, &parts);
    std::ostringstream out;
    out << std::put_time(&parts, "%FT%T.") << std::setfill('0') << std::setw(3) << part << "Z " << line << "\n";
    std::cerr << out.str() << std::flush;
}

inline Response json_response(http::status status, const Json& json) {
    Response response{status, 11};
    response.set(http::field::content_type, "application/json");
    response.body() = json.dump(-1, ' ', true, Json::error_handler_t::replace) + "\n";
    return response;
}

inline Response error_response(http::status status, const std::string& message) {
    return json_response(status, {{"error", message}});
}

/// A refusal that another attempt may not meet.
inline Response busy_response(const std::string& message) {
    Response response = error_response(http::status::service_unavailable, message);
    response.set(http::field::retry_after, "1");
    return response;
}

class Session;

/// Accepts connections until a signal, then answers what it has taken. All of it but the workers is on `run`'s thread.
class HttpServer {
   public:
    /// model: what /v1/model answers.
    /// build: the labels of the metric `fastddim_build_info`.
    ///
    /// Throws std::runtime_error: the address cannot be listened on.
    HttpServer(const Settings& settings, const fastddim::OrtSampler& sampler, const RequestReader& reader, Json model,
               const std::map<std::string, std::string>& build)
        : settings_(settings), reader_(reader), model_(std::move(model)), metrics_(build), queue_(settings.queue),
          workers_(queue_, sampler, settings.workers, settings.max_batch, [this](std::uint64_t id, Outcome outcome) {
              asio::post(io_, [this, id, result = std::move(outcome)]() mutable { complete(id, std::move(result)); });
          }) {
        beast::error_code failed;
        const asio::ip::tcp::endpoint endpoint(asio::ip::make_address(settings.host, failed), settings.port);
        if (failed)
            throw std::runtime_error("--host: '" + settings.host + "' is no address; pass one such as 127.0.0.1 or ::");
        acceptor_.open(endpoint.protocol(), failed);
        if (!failed) acceptor_.set_option(asio::socket_base::reuse_address(true), failed);
        if (!failed) acceptor_.bind(endpoint, failed);
        if (!failed) acceptor_.listen(asio::socket_base::max_listen_connections, failed);
        if (failed)
            throw std::runtime_error("--host, --port: " + settings.host + " port " + std::to_string(settings.port) +
                                     " cannot be listened on (" + failed.message() +
                                     "); pass another, or port 0 for a free one");
    }

    asio::ip::tcp::endpoint endpoint() const { return acceptor_.local_endpoint(); }

    /// Returns when, after SIGINT or SIGTERM, all that was accepted is answered; a second signal ends the process.
    void run() {
        signals_.async_wait([this](beast::error_code failed, int) {
            if (!failed) stop();
        });
        accept();
        for (bool ended = false; !ended;) {
            try {
                io_.run();
                ended = true;
            } catch (const std::exception& error) {
                log(std::string("a connection was lost: ") + error.what());
            }
        }
        // From here on a signal is the system's again.
        signals_.clear();
    }

   private:
    friend class Session;

    // For requests that are on their way when a signal comes.
    static constexpr std::chrono::milliseconds stop_grace{200};
    // Until the next attempt, where the process has no room for another connection.
    static constexpr std::chrono::milliseconds accept_pause{100};

    void accept();
    void admit(asio::ip::tcp::socket socket);
    void stop();
    void complete(std::uint64_t id, Outcome outcome);

    void end_if_done() {
        if (!stopping_ || !sessions_.empty()) return;
        signals_.cancel();
        pause_.cancel();
    }

    /// The job, or nothing where the queue is full.
    std::shared_ptr<const Job> submit(Session& session, Request request) {
        auto job = std::make_shared<const Job>(Job{next_id_++, std::move(request)});
        if (!queue_.push(job)) return nullptr;
        ++accepted_;
        waiting_[job->id] = &session;
        return job;
    }

    /// Nobody waits for the job any more; whether that was in time to leave it out.
    bool give_up(const std::shared_ptr<const Job>& job) {
        waiting_.erase(job->id);
        if (!queue_.remove(job)) return false;
        --accepted_;
        return true;
    }

    std::string metrics_text() const {
        // A worker may take jobs between the two numbers.
        const std::size_t queued = std::min(queue_.size(), accepted_);
        return metrics_.text({queued, accepted_ - queued, sessions_.size()});
    }

    const Settings& settings_;
    const RequestReader& reader_;
    const Json model_;
    Metrics metrics_;
    std::uint64_t next_id_ = 0;
    /// Jobs that are queued or being sampled.
    std::size_t accepted_ = 0;
    bool stopping_ = false;
    /// Sessions by the job that they wait for.
    std::map<std::uint64_t, Session*> waiting_;
    // Kept alive by their handlers in `io_`, which is destroyed before.
    std::set<Session*> sessions_;
    asio::io_context io_{1};
    asio::ip::tcp::acceptor acceptor_{io_};
    asio::signal_set signals_{io_, SIGINT, SIGTERM};
    asio::steady_timer pause_{io_};
    Queue queue_;
    Workers workers_;
};

/// A connection: one request after the other, until either side closes it.
class Session : public std::enable_shared_from_this<Session> {
   public:
    Session(HttpServer& server, asio::ip::tcp::socket socket)
        : server_(server), stream_(std::move(socket)), deadline_(server.io_) {
        server_.sessions_.insert(this);
    }

    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    ~Session() {
        if (job_) server_.give_up(job_);
        server_.sessions_.erase(this);
        server_.end_if_done();
    }

    /// Waits for a request's first byte.
    void wait() {
        parser_.reset();
        if (buffer_.size() != 0) return read();
        idle_ = true;
        stream_.expires_after(server_.stopping_ ? HttpServer::stop_grace : server_.settings_.idle_timeout);
        stream_.async_read_some(buffer_.prepare(4096),
                                [self = shared_from_this()](beast::error_code failed, std::size_t count) {
                                    self->idle_ = false;
                                    self->buffer_.commit(count);
                                    if (!failed) self->read();
                                });
    }

    void close_if_idle() {
        if (idle_) stream_.close();
    }

    /// What a worker made of the request.
    void finish(Outcome outcome) {
        job_.reset();
        deadline_.cancel();
        if (outcome.kind == Outcome::Kind::refused)
            return respond(error_response(http::status::bad_request, outcome.content));
        if (outcome.kind == Outcome::Kind::failed) {
            log("sampling failed: " + outcome.content);
            return respond(error_response(http::status::internal_server_error,
                                          "sampling failed; the server's log says why"));
        }
        server_.metrics_.observe_latency(seconds_since(arrived_));
        Response response{http::status::ok, 11};
        response.set(http::field::content_type, "image/png");
        response.body() = std::move(outcome.content);
        respond(std::move(response));
    }

   private:
    struct Route {
        std::string_view path;
        http::verb method;
        void (Session::*answer)();
    };

    static constexpr std::uint32_t header_limit = 8192;
    // Of what is read and not yet understood: a chunk's extensions and trailers count as neither header nor body.
    static constexpr std::size_t buffer_limit = 65536;
    static constexpr std::chrono::seconds linger_time{2};

    void read() {
        parser_.emplace();
        parser_->header_limit(header_limit);
        parser_->body_limit(server_.settings_.max_body);
        arrived_ = Clock::now();
        stream_.expires_after(server_.settings_.read_timeout);
        read_header(0);
    }

    /// By hand, because the parser's own limit is of one line, not of all.
    void read_header(std::size_t taken) {
        beast::error_code failed;
        const std::size_t count = parser_->put(buffer_.data(), failed);
        buffer_.consume(count);
        if (failed && failed != http::error::need_more) return reject(failed);
        if (parser_->is_header_done()) return read_body();
        taken += count;
        if (taken + buffer_.size() > header_limit) return reject(http::error::header_limit);
        stream_.async_read_some(buffer_.prepare(4096),
                                [self = shared_from_this(), taken](beast::error_code ended, std::size_t size) {
                                    if (ended) return;
                                    self->buffer_.commit(size);
                                    self->read_header(taken);
                                });
    }

    void read_body() {
        if (beast::iequals(parser_->get()[http::field::expect], "100-continue")) {
            static constexpr std::string_view go_on = "HTTP/1.1 100 Continue\r\n\r\n";
            beast::error_code ignored;
            // Of a client that does not read it there is nothing to wait for.
            stream_.socket().send(asio::buffer(go_on), 0, ignored);
        }
        http::async_read(stream_, buffer_, *parser_,
                         [self = shared_from_this()](beast::error_code failed, std::size_t) {
                             if (failed) return self->reject(failed);
                             self->arrived_ = Clock::now();
                             self->answer();
                         });
    }

    static Response too_long(http::status status, const std::string& what, std::size_t limit) {
        return error_response(status, what + ": more than " + std::to_string(limit) + " bytes; pass less");
    }

    /// Answers what is no request, unless the client is gone or too slow.
    void reject(beast::error_code failed) {
        const beast::error_code malformed = http::error::bad_method;
        if (failed.category() != malformed.category() || failed == http::error::partial_message) return;
        if (failed == http::error::body_limit)
            return respond(too_long(http::status::payload_too_large, "body", server_.settings_.max_body), true);
        if (failed == http::error::header_limit)
            return respond(too_long(http::status::request_header_fields_too_large, "header", header_limit), true);
        if (failed == http::error::buffer_overflow)
            return respond(too_long(http::status::request_header_fields_too_large, "chunk extensions, trailers",
                                    buffer_limit), true);
        respond(error_response(http::status::bad_request, "no HTTP request: " + failed.message()), true);
    }

    std::string_view path() const {
        const beast::string_view target = parser_->get().target();
        return std::string_view(target.data(), target.size()).substr(0, target.find('?'));
    }

    static const Route* find_route(std::string_view path) {
        static constexpr std::array<Route, 4> routes{{
            {"/v1/sample", http::verb::post, &Session::answer_sample},
            {"/v1/model", http::verb::get, &Session::answer_model},
            {"/healthz", http::verb::get, &Session::answer_healthz},
            {"/metrics", http::verb::get, &Session::answer_metrics},
        }};
        for (const Route& route : routes)
            if (route.path == path) return &route;
        return nullptr;
    }

    void answer() {
        try {
            const Route* route = find_route(path());
            if (route == nullptr)
                return respond(error_response(http::status::not_found,
                                              "no such path; there are /v1/sample, /v1/model, /healthz and /metrics"));
            const bool get = route->method == http::verb::get;
            const http::verb method = parser_->get().method();
            if (method == route->method || (get && method == http::verb::head)) return (this->*route->answer)();
            const bool options = method == http::verb::options;
            Response response = options ? Response{http::status::ok, 11}
                                        : error_response(http::status::method_not_allowed,
                                                         "method: not for this path; see the header Allow");
            response.set(http::field::allow, get ? "GET, HEAD, OPTIONS" : "POST, OPTIONS");
            respond(std::move(response));
        } catch (const BadRequest& error) {
            respond(error_response(http::status::bad_request, error.what()));
        }
    }

    void answer_healthz() {
        respond(server_.stopping_ ? busy_response("the server is stopping")
                                  : json_response(http::status::ok, {{"status", "ok"}}));
    }

    void answer_model() { respond(json_response(http::status::ok, server_.model_)); }

    void answer_metrics() {
        Response response{http::status::ok, 11};
        response.set(http::field::content_type, "text/plain; version=0.0.4");
        response.body() = server_.metrics_text();
        respond(std::move(response));
    }

    void answer_sample() {
        const auto& request = parser_->get();
        if (server_.stopping_) return respond(busy_response("the server is stopping; ask another"));
        const beast::string_view type = request[http::field::content_type];
        const beast::string_view essence = type.substr(0, type.find_first_of("; "));
        if (!beast::iequals(essence, "application/json") || request.count(http::field::content_encoding) != 0)
            return respond(error_response(http::status::unsupported_media_type,
                                          "Content-Type: pass application/json, without a Content-Encoding"));
        job_ = server_.submit(*this, server_.reader_.read(request.body()));
        if (!job_) return respond(busy_response("the queue is full; try again later"));
        deadline_.expires_after(server_.settings_.timeout);
        deadline_.async_wait([self = shared_from_this(), job = job_](beast::error_code) {
            if (self->job_ == job) self->expire();
        });
        watch();
    }

    void expire() {
        const bool unsampled = server_.give_up(job_);
        job_.reset();
        respond(unsampled ? busy_response("the request waited too long for its turn; try again later")
                          : error_response(http::status::gateway_timeout,
                                           "sampling took too long; pass fewer num_inference_steps"));
    }

    /// Gives a request up whose client closes the connection, or its sending half, before the answer.
    void watch() {
        stream_.socket().async_wait(asio::socket_base::wait_read,
                                    [self = shared_from_this(), job = job_](beast::error_code failed) {
                                        if (!failed && self->job_ == job && self->is_gone()) self->abandon();
                                    });
    }

    bool is_gone() {
        char next = 0;
        beast::error_code failed;
        stream_.socket().receive(asio::buffer(&next, 1), asio::socket_base::message_peek, failed);
        return failed && failed != asio::error::would_block;
    }

    void abandon() {
        server_.give_up(job_);
        job_.reset();
        deadline_.cancel();
        server_.metrics_.count_abandoned();
        log_request("left");
        stream_.close();
    }

    /// last: the connection ends with it, as what follows on it cannot be told.
    void respond(Response response, bool last = false) {
        const auto& request = parser_->get();
        const Route* route = find_route(path());
        const unsigned status = response.result_int();
        server_.metrics_.count_request(route == nullptr ? "other" : std::string(route->path), status);
        log_request(std::to_string(status));
        const bool keep = !last && !server_.stopping_ && request.keep_alive();
        response_ = std::move(response);
        response_.version(last ? 11 : request.version());
        response_.keep_alive(keep);
        response_.prepare_payload();
        if (request.method() == http::verb::head) response_.body().clear();
        stream_.expires_after(server_.settings_.write_timeout);
        http::async_write(stream_, response_,
                          [self = shared_from_this(), keep](beast::error_code failed, std::size_t) {
                              if (failed) return;
                              if (keep) return self->wait();
                              self->linger();
                          });
    }

    /// Reads on for a while: a connection closed with bytes unread would take the answer with it.
    void linger() {
        beast::error_code ignored;
        stream_.socket().shutdown(asio::socket_base::shutdown_send, ignored);
        stream_.expires_after(linger_time);
        drain();
    }

    void drain() {
        buffer_.clear();
        stream_.async_read_some(buffer_.prepare(4096),
                                [self = shared_from_this()](beast::error_code failed, std::size_t) {
                                    if (!failed) self->drain();
                                });
    }

    void log_request(const std::string& status) const {
        const auto& request = parser_->get();
        std::ostringstream line;
        line << status << " " << (request.method_string().empty() ? "-" : request.method_string()) << " ";
        for (const char letter : request.target().substr(0, 100)) line << (letter > ' ' && letter < 127 ? letter : '?');
        line << " " << std::fixed << std::setprecision(1) << 1e3 * seconds_since(arrived_) << " ms";
        log(line.str());
    }

    HttpServer& server_;
    beast::tcp_stream stream_;
    asio::steady_timer deadline_;
    beast::flat_buffer buffer_{buffer_limit};
    std::optional<http::request_parser<http::string_body>> parser_;
    Response response_;
    Clock::time_point arrived_;
    bool idle_ = false;
    /// What a worker has, while the answer waits for it.
    std::shared_ptr<const Job> job_;
};

inline void HttpServer::accept() {
    acceptor_.async_accept([this](beast::error_code failed, asio::ip::tcp::socket socket) {
        if (!failed) admit(std::move(socket));
        if (!acceptor_.is_open()) return;
        if (!failed) return accept();
        pause_.expires_after(accept_pause);
        pause_.async_wait([this](beast::error_code cancelled) {
            if (!cancelled) accept();
        });
    });
}

inline void HttpServer::admit(asio::ip::tcp::socket socket) {
    static constexpr std::string_view full =
        "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    beast::error_code ignored;
    socket.non_blocking(true, ignored);
    if (sessions_.size() >= settings_.max_connections) {
        metrics_.count_refused_connection();
        socket.send(asio::buffer(full), 0, ignored);
        return;
    }
    socket.set_option(asio::ip::tcp::no_delay(true), ignored);
    std::make_shared<Session>(*this, std::move(socket))->wait();
}

inline void HttpServer::stop() {
    log("stopping: " + std::to_string(accepted_) + " requests to finish");
    stopping_ = true;
    signals_.async_wait([](beast::error_code failed, int signal) {
        if (!failed) std::_Exit(128 + signal);
    });
    // Those whose connection stands already are answered too.
    beast::error_code failed;
    acceptor_.non_blocking(true, failed);
    while (!failed) {
        asio::ip::tcp::socket socket = acceptor_.accept(failed);
        if (!failed) admit(std::move(socket));
    }
    acceptor_.close(failed);
    pause_.expires_after(stop_grace);
    pause_.async_wait([this](beast::error_code) {
        for (Session* session : sessions_) session->close_if_idle();
    });
    end_if_done();
}

inline void HttpServer::complete(std::uint64_t id, Outcome outcome) {
    --accepted_;
    metrics_.add_sampling(outcome.seconds);
    const auto found = waiting_.find(id);
    if (found == waiting_.end()) return;
    Session* session = found->second;
    waiting_.erase(found);
    session->finish(std::move(outcome));
}

}  // namespace server
