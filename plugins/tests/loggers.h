// Loggers and their finders as TensorRT 10 and TensorRT 11 lay them out. Each is defined without
// TensorRT's headers, because one program cannot include those of both.
#pragma once

#include <string>
#include <vector>

namespace loggers {

struct Message {
    int severity;
    std::string text;
};

// What the loggers below were told
inline std::vector<Message> messages;

// For setLoggerFinder. `lose` takes the logger away that the finder finds.
void* tensorrt10_finder();
void* tensorrt11_finder();
void* throwing_finder();
void lose_tensorrt10_logger(bool lost);
void lose_tensorrt11_logger(bool lost);

}  // namespace loggers
