#include <cstdint>

#include "loggers.h"

namespace nvinfer1 {

class InterfaceInfo {
public:
    const char* kind;
    int32_t major, minor;
};

enum class APILanguage : int32_t { kCPP, kPYTHON };

class IVersionedInterface {
public:
    virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
    virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
    virtual ~IVersionedInterface() noexcept = default;
};

namespace v_1_0 {

class ILogger : public IVersionedInterface {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };

    InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
    virtual void log(Severity severity, const char* message) noexcept = 0;
    ~ILogger() override = default;
};

class ILoggerFinder : public IVersionedInterface {
public:
    InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILoggerFinder", 1, 0}; }
    virtual ILogger* findLogger() = 0;

protected:
    ~ILoggerFinder() override = default;
};

}  // namespace v_1_0
}  // namespace nvinfer1

namespace {

class Logger final : public nvinfer1::v_1_0::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        loggers::messages.push_back({static_cast<int>(severity), message});
    }
};

class Finder final : public nvinfer1::v_1_0::ILoggerFinder {
public:
    nvinfer1::v_1_0::ILogger* findLogger() override { return lost ? nullptr : &logger; }

    Logger logger;
    bool lost = false;
};

Finder finder;

}  // namespace

void* loggers::tensorrt11_finder() {
    return static_cast<nvinfer1::v_1_0::ILoggerFinder*>(&finder);
}

void loggers::lose_tensorrt11_logger(bool lost) {
    finder.lost = lost;
}
