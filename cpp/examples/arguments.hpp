// The command line of the example programs: one bundle, and options with a value each.
#pragma once

#include <charconv>
#include <cstddef>
#include <exception>
#include <filesystem>
#include <functional>
#include <iostream>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace arguments {

struct Option {
    std::string name;
    std::string value;
    std::string meaning;
    std::function<void(const std::string&)> set;
};

/// The number in [low, high] that is the whole text; throws std::invalid_argument, which names the option.
template <class T>
T number(const std::string& option, const std::string& text, const std::string& wanted,
         T low = std::numeric_limits<T>::lowest(), T high = std::numeric_limits<T>::max()) {
    T value{};
    const char* end = text.data() + text.size();
    const auto [last, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc{} || last != end || !(value >= low && value <= high))
        throw std::invalid_argument(option + ": '" + text + "'; pass " + wanted);
    return value;
}

/// An option for an integer in [low, high].
template <class T>
Option integer(const std::string& name, const std::string& meaning, T& to, T low,
               T high = std::numeric_limits<T>::max()) {
    const std::string wanted = "an integer in [" + std::to_string(low) + ", " + std::to_string(high) + "]";
    return {name, "N", meaning + " [" + std::to_string(to) + "]",
            [=, &to](const std::string& text) { to = number<T>(name, text, wanted, low, high); }};
}

/// The bundle, once all options are set; none if help is asked for. Throws std::invalid_argument: bad words.
inline std::optional<std::filesystem::path> parse(const std::vector<std::string>& words,
                                                  const std::vector<Option>& options) {
    std::filesystem::path bundle;
    for (std::size_t k = 0; k < words.size(); ++k) {
        const std::string& word = words[k];
        if (word == "--help" || word == "-h") return std::nullopt;
        if (word.rfind('-', 0) != 0) {
            if (!bundle.empty()) throw std::invalid_argument("'" + word + "': a second bundle; pass one");
            bundle = word;
            continue;
        }
        const Option* found = nullptr;
        for (const Option& option : options)
            if (word == option.name) found = &option;
        if (found == nullptr) throw std::invalid_argument(word + ": no such option; --help lists them");
        if (++k == words.size()) throw std::invalid_argument(word + ": no value; pass one");
        found->set(words[k]);
    }
    if (bundle.empty())
        throw std::invalid_argument("BUNDLE: missing; pass a folder of `fastddim export` (--help lists options)");
    return bundle;
}

/// What `main` returns: 0 after the work or the help that is asked for, 2 after an error, which is printed.
inline int run(const std::vector<std::string>& words, const std::string& program, const std::string& about,
               const std::vector<Option>& options, const std::function<void(const std::filesystem::path&)>& work) {
    try {
        if (const auto bundle = parse(words, options)) {
            work(*bundle);
            return 0;
        }
        std::cout << "usage: " << program << " BUNDLE [options]\n\n" << about << "\n\n";
        for (const Option& option : options) {
            const std::string head = option.name + " " + option.value;
            const std::size_t gap = head.size() < 26 ? 26 - head.size() : 1;
            std::cout << "  " << head << std::string(gap, ' ') << option.meaning << "\n";
        }
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 2;
    }
}

}  // namespace arguments
