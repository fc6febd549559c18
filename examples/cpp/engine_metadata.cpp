#include "engine_metadata.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

namespace {

constexpr int kFormat = 3;
constexpr std::uintmax_t kLargest = 1 << 20;
constexpr char const* kRemedy = ": run `simprune-deploy build FOLDER`";

// Compares versions as far as both tell them: 10.3.0 and 10.3.0.30 are the same.
bool sameVersion(std::string const& one, std::string const& other) {
    std::string const shorter = std::min(one, other, [](auto const& a, auto const& b) { return a.size() < b.size(); });
    std::string const longer = shorter == one ? other : one;
    return longer == shorter || longer.compare(0, shorter.size() + 1, shorter + ".") == 0;
}

std::string built(EngineMetadata const& engine_metadata) {
    std::string text = "the engine was built for SM";
    for (std::string const& each : engine_metadata.computeCapabilities) {
        text += " " + each;
    }
    return text + " with " + engine_metadata.flavour + " " + engine_metadata.version;
}

}  // namespace

EngineMetadata readEngineMetadata(std::string const& engine) {
    std::string const path = engine + ".json";
    std::error_code error;
    std::uintmax_t const size = std::filesystem::file_size(path, error);
    if (error) {
        throw Failure(path + " cannot be read: `simprune-deploy build` writes it beside the engine");
    }
    if (size > kLargest) {
        throw Failure(path + " is damaged: build the engine again");
    }
    try {
        nlohmann::json const values = nlohmann::json::parse(std::ifstream(path));
        int const format = values.at("format").get<int>();
        if (format != kFormat) {
            throw Failure(
                path + " has format " + std::to_string(format) + ", and this program reads " + std::to_string(kFormat));
        }
        EngineMetadata engine_metadata;
        values.at("flavour").get_to(engine_metadata.flavour);
        values.at("version").get_to(engine_metadata.version);
        values.at("compute_capabilities").get_to(engine_metadata.computeCapabilities);
        values.at("engine").at("bytes").get_to(engine_metadata.bytes);
        if (!values.at("plugin").is_null()) {
            values.at("plugin").at("file").get_to(engine_metadata.plugin);
        }
        return engine_metadata;
    } catch (nlohmann::json::exception const& problem) {
        throw Failure(path + " is damaged (" + problem.what() + "): build the engine again");
    }
}

void checkTensorRT(EngineMetadata const& engine_metadata, std::string const& version) {
    if (engine_metadata.flavour != "tensorrt") {
        throw Failure(built(engine_metadata) + ", and this program is linked with TensorRT");
    }
    if (!sameVersion(engine_metadata.version, version)) {
        throw Failure(built(engine_metadata) + "; this is TensorRT " + version + kRemedy);
    }
}

void checkGpu(EngineMetadata const& engine_metadata, std::string const& computeCapability) {
    auto const& known = engine_metadata.computeCapabilities;
    if (std::find(known.begin(), known.end(), computeCapability) == known.end()) {
        throw Failure(built(engine_metadata) + "; this is SM " + computeCapability + kRemedy);
    }
}
