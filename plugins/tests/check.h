// Checks that print what they saw and count what failed.
#pragma once

#include <iostream>
#include <sstream>
#include <string>

namespace check {

inline int passed = 0, failed = 0;

inline bool record(bool good, const char* file, int line, const std::string& what) {
    (good ? passed : failed) += 1;
    if (!good) std::cerr << file << ":" << line << ": " << what << "\n";
    return good;
}

template <class Actual, class Expected>
bool equal(const Actual& actual, const Expected& expected, const char* text, const char* file, int line) {
    std::ostringstream what;
    what << text << " is " << actual << ", not " << expected;
    return record(actual == expected, file, line, what.str());
}

inline bool contains(
    const std::string& text, const std::string& part, const char* expression, const char* file, int line) {
    return record(
        text.find(part) != std::string::npos, file, line,
        std::string(expression) + " is \"" + text + "\", without \"" + part + "\"");
}

// The exit status of the test. One that checked nothing has failed.
inline int result() {
    std::cout << passed << " checks passed, " << failed << " failed\n";
    return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition) check::record(static_cast<bool>(condition), __FILE__, __LINE__, #condition " is false")
#define CHECK_EQUAL(actual, expected) check::equal(actual, expected, #actual, __FILE__, __LINE__)
#define CHECK_CONTAINS(text, part) check::contains(text, part, #text, __FILE__, __LINE__)
