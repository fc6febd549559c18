// Errors of the plugin, to the logger of the TensorRT that called it.
#pragma once

#include <NvInferRuntime.h>

namespace simprune {
namespace tensorrt {

// What TensorRT hands to setLoggerFinder. A finder of a kind unknown here is not used.
void set_logger_finder(void* finder) noexcept;

// For the static library, which is linked to the TensorRT that it was compiled for.
void set_logger_source(nvinfer1::ILogger* (*source)() noexcept) noexcept;

// One line to the logger, or to stderr if there is none.
void log_error(const char* format, ...) noexcept __attribute__((format(printf, 1, 2)));

}  // namespace tensorrt
}  // namespace simprune
