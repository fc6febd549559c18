#include <cstdint>
#include <stdexcept>

#include "loggers.h"

namespace nvinfer1 {

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };

    virtual void log(Severity severity, const char* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class ILoggerFinder {
public:
    virtual ILogger* findLogger() = 0;

protected:
    virtual ~ILoggerFinder() = default;
};

}  // namespace nvinfer1

namespace {

class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        loggers::messages.push_back({static_cast<int>(severity), message});
    }
};

class Finder final : public nvinfer1::ILoggerFinder {
public:
    nvinfer1::ILogger* findLogger() override { return lost ? nullptr : &logger; }

    Logger logger;
    bool lost = false;
};

class Thrower final : public nvinfer1::ILoggerFinder {
public:
    nvinfer1::ILogger* findLogger() override { throw std::runtime_error("no logger"); }
};

Finder finder;
Thrower thrower;

}  // namespace

void* loggers::tensorrt10_finder() {
    return static_cast<nvinfer1::ILoggerFinder*>(&finder);
}

void* loggers::throwing_finder() {
    return static_cast<nvinfer1::ILoggerFinder*>(&thrower);
}

void loggers::lose_tensorrt10_logger(bool lost) {
    finder.lost = lost;
}
