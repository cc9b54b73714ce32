// server BUNDLE [options]: pictures from an exported bundle over HTTP, until SIGINT or SIGTERM; see cpp/README.md.
#include <csignal>
#include <filesystem>
#include <iostream>
#include <map>
#include <string>

#include "arguments.hpp"
#include "fastddim/ort_sampler.hpp"
#include "server/http.hpp"
#include "server/request.hpp"
#include "server/settings.hpp"

namespace {

server::Json describe(const fastddim::Manifest& manifest, const server::RequestReader& reader,
                      const server::Settings& settings) {
    server::Json range = nullptr;
    if (manifest.sample.range) range = *manifest.sample.range;
    const auto& sampling = manifest.sampling;
    server::Json eta = nullptr, limit = nullptr;
    if (manifest.scheduling && manifest.scheduling->eta()) eta = *manifest.scheduling->eta();
    if (sampling.limit)
        limit = {{"kind", sampling.limit->kind}, {"bound", sampling.limit->bound}, {"ratio", sampling.limit->ratio}};
    return {{"kind", manifest.kind},
            {"sample", {{"shape", manifest.sample.shape}, {"layout", manifest.sample.layout}, {"range", range}}},
            {"sampling", {{"dtype", sampling.dtype}, {"eta", eta}, {"limit", limit}}},
            {"request", reader.describe()},
            {"limits", {{"queue", settings.queue}, {"timeout_ms", settings.timeout.count()}}},
            {"versions", manifest.versions}};
}

void serve(const std::filesystem::path& bundle, const server::Settings& settings) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(settings.threads);
    const fastddim::OrtSampler sampler(fastddim::open_bundle(bundle), options, true);
    const server::RequestReader reader(sampler.bundle(), settings.max_steps);
    const fastddim::Manifest& manifest = sampler.bundle().manifest;
    const std::map<std::string, std::string> build{{"kind", manifest.kind}, {"onnxruntime", Ort::GetVersionString()}};
    server::HttpServer http(settings, sampler, reader, describe(manifest, reader, settings), build);
    // The first run is slower than those that follow; and a model that does not run ends here.
    sampler(server::to_call({reader.shortest()}));
    const auto endpoint = http.endpoint();
    std::cout << "listening on http://" << endpoint << std::endl;
    http.run();
}

}  // namespace

int main(int count, char** words) {
    // A log that nobody reads any more is an error of its stream, not a signal.
    std::signal(SIGPIPE, SIG_IGN);
    server::Settings settings;
    return arguments::run({words + 1, words + count}, "server",
                          "Pictures from an exported bundle over HTTP; see cpp/README.md.",
                          server::options_of(settings),
                          [&](const std::filesystem::path& bundle) { serve(bundle, settings); });
}
