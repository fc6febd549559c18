#include "tensorrt_log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <string_view>
#include <typeinfo>

namespace simprune {
namespace tensorrt {
namespace {

using nvinfer1::ILogger;

// TensorRT 11 and TensorRT-RTX put two functions of a common base and two destructors before the
// ones of ILoggerFinder and ILogger, TensorRT 10 puts nothing there. One binary serves both, so it
// goes by the type that the finder itself names, not by the headers it was compiled with.
constexpr int kSlotInTensorRT10 = 0;
constexpr int kSlotInTensorRT11 = 4;
constexpr int kUnknownSlot = -1;

std::atomic<void*> logger_finder{nullptr};
std::atomic<ILogger* (*)() noexcept> logger_source{nullptr};

const void* function_table(const void* object) {
    return *static_cast<const void* const*>(object);
}

// Where the first function of the finder's interface stands in its table.
int slot_of_interface(const void* finder) {
    const auto* table = static_cast<const std::type_info* const*>(function_table(finder));
    for (const std::type_info* type = table[-1]; type != nullptr;) {
        const std::string_view name = type->name();
        if (name == "N8nvinfer113ILoggerFinderE") return kSlotInTensorRT10;
        if (name == "N8nvinfer15v_1_013ILoggerFinderE") return kSlotInTensorRT11;
        // The Itanium C++ ABI puts the base behind the type of a class that has just one
        const bool derived = std::string_view(typeid(*type).name()) == "N10__cxxabiv120__si_class_type_infoE";
        type = derived ? *reinterpret_cast<const std::type_info* const*>(type + 1) : nullptr;
    }
    return kUnknownSlot;
}

template <class Function>
Function* function_in(const void* object, int slot) {
    return reinterpret_cast<Function*>(static_cast<void* const*>(function_table(object))[slot]);
}

bool log_through_finder(void* finder, const char* message) {
    const int slot = slot_of_interface(finder);
    if (slot == kUnknownSlot) return false;
    void* logger = function_in<void*(void*)>(finder, slot)(finder);
    if (logger == nullptr) return false;
    constexpr auto severity = static_cast<int32_t>(ILogger::Severity::kERROR);
    function_in<void(void*, int32_t, const char*)>(logger, slot)(logger, severity, message);
    return true;
}

bool log_through_source(ILogger* (*source)() noexcept, const char* message) {
    ILogger* logger = source();
    if (logger == nullptr) return false;
    logger->log(ILogger::Severity::kERROR, message);
    return true;
}

}  // namespace

void set_logger_finder(void* finder) noexcept {
    // Its library may be unloaded while this one stays, so it is held from now on
    Dl_info where{};
    if (finder != nullptr && dladdr(function_table(finder), &where) != 0) {
        void* library = dlopen(where.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
        if (library != nullptr) dlclose(library);
    }
    logger_finder.store(finder);
}

void set_logger_source(ILogger* (*source)() noexcept) noexcept {
    logger_source.store(source);
}

void log_error(const char* format, ...) noexcept {
    char message[1024] = "SimilarityPrune: ";
    constexpr size_t prefix = std::char_traits<char>::length("SimilarityPrune: ");
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message + prefix, sizeof message - prefix, format, arguments);
    va_end(arguments);
    // Names and values come from files: whatever stands in them, the message stays one line
    for (char* c = message; *c != '\0'; ++c) {
        if (static_cast<unsigned char>(*c) < ' ' || *c == 0x7f) *c = '?';
    }
    try {
        void* finder = logger_finder.load();
        if (finder != nullptr && log_through_finder(finder, message)) return;
        const auto source = logger_source.load();
        if (source != nullptr && log_through_source(source, message)) return;
    } catch (...) {
        // A logger that throws has not shown the message
    }
    std::fprintf(stderr, "[simprune] %s\n", message);
}

}  // namespace tensorrt
}  // namespace simprune
