// What the metadata beside an engine says, as far as a program needs it before it loads the engine.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

// A mistake or a mismatch; what() is one line.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct EngineMetadata {
    std::string flavour;                           // "tensorrt" or "tensorrt-rtx"
    std::string version;                           // of the TensorRT that built it, and that alone runs it
    std::vector<std::string> computeCapabilities;  // such as "8.7"
    std::string plugin;                            // the plugin's library, by name; empty: it has none in it
    std::uintmax_t bytes = 0;                      // the engine's size
};

// Reads ENGINE.json beside an engine. Throws Failure.
EngineMetadata readEngineMetadata(std::string const& engine);

// Throws Failure unless the TensorRT here ("10.3.0") is the one that built an engine.
void checkTensorRT(EngineMetadata const& engine_metadata, std::string const& version);

// Throws Failure unless an engine is for a GPU ("8.7").
void checkGpu(EngineMetadata const& engine_metadata, std::string const& computeCapability);
