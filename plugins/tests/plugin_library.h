// The library under test, through the two functions that TensorRT calls, and the fields of a plugin.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "loggers.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);
// Any finder: TensorRT 10 and TensorRT 11 have different ones
extern "C" void setLoggerFinder(void* finder);

namespace plugin_library {

using PluginPointer = std::unique_ptr<nvinfer1::IPluginV3>;

// Fields that own their data, at addresses that nothing aligns.
class Fields {
public:
    Fields& add(const char* name, int32_t value) {
        return add(name, nvinfer1::PluginFieldType::kINT32, &value, sizeof value, 1);
    }
    Fields& add(const char* name, int64_t value) {
        return add(name, nvinfer1::PluginFieldType::kINT64, &value, sizeof value, 1);
    }
    Fields& add(const char* name, const std::string& text) {
        return add(name, nvinfer1::PluginFieldType::kCHAR, text.data(), text.size(), static_cast<int32_t>(text.size()));
    }
    Fields& add(const char* name, const char* text) { return add(name, std::string(text)); }
    Fields& add(const char* name, nvinfer1::PluginFieldType type, const void* data, size_t bytes, int32_t length) {
        std::vector<char> copy(bytes + 1);
        if (bytes > 0) std::memcpy(copy.data() + 1, data, bytes);
        owned_.push_back({name, std::move(copy), type, length});
        return *this;
    }
    Fields& add_without_data(const char* name) {
        owned_.push_back({name, {}, nvinfer1::PluginFieldType::kINT32, 1});
        return *this;
    }
    // Valid as long as this object and until the next call
    nvinfer1::PluginFieldCollection collection() const {
        fields_.clear();
        for (const Owned& one : owned_) {
            fields_.emplace_back(
                one.name.c_str(), one.data.empty() ? nullptr : one.data.data() + 1, one.type, one.length);
        }
        nvinfer1::PluginFieldCollection all{};
        all.nbFields = static_cast<int32_t>(fields_.size());
        all.fields = fields_.data();
        return all;
    }

private:
    struct Owned {
        std::string name;
        std::vector<char> data;
        nvinfer1::PluginFieldType type;
        int32_t length;
    };

    std::vector<Owned> owned_;
    mutable std::vector<nvinfer1::PluginField> fields_;
};

inline nvinfer1::IPluginCreatorV3One& creator() {
    int32_t count = 0;
    return *static_cast<nvinfer1::IPluginCreatorV3One*>(getCreators(count)[0]);
}

inline PluginPointer create(
    const nvinfer1::PluginFieldCollection* fields, nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD) {
    return PluginPointer(creator().createPlugin("layer", fields, phase));
}

inline PluginPointer create(const Fields& fields, nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD) {
    const nvinfer1::PluginFieldCollection collection = fields.collection();
    return create(&collection, phase);
}

inline nvinfer1::IPluginV3OneCore& core(nvinfer1::IPluginV3& plugin) {
    return *static_cast<nvinfer1::IPluginV3OneCore*>(
        plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kCORE));
}

inline nvinfer1::IPluginV3OneBuild& build(nvinfer1::IPluginV3& plugin) {
    return *static_cast<nvinfer1::IPluginV3OneBuild*>(
        plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}

inline nvinfer1::IPluginV3OneRuntime& runtime(nvinfer1::IPluginV3& plugin) {
    return *static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

// What the plugin logged since the last call, one message a line.
inline std::string logged() {
    std::string all;
    for (const loggers::Message& message : loggers::messages) all += message.text + "\n";
    loggers::messages.clear();
    return all;
}

// A size of -1 is not known
inline nvinfer1::Dims dims(std::initializer_list<int64_t> sizes) {
    nvinfer1::Dims result{};
    for (const int64_t size : sizes) result.d[result.nbDims++] = size;
    return result;
}

inline nvinfer1::PluginTensorDesc desc(
    nvinfer1::DataType type, const nvinfer1::Dims& dims,
    nvinfer1::TensorFormat format = nvinfer1::TensorFormat::kLINEAR) {
    nvinfer1::PluginTensorDesc result{};
    result.dims = dims;
    result.type = type;
    result.format = format;
    result.scale = 1.0f;
    return result;
}

// A profile whose smallest and usual sizes are not its largest
inline nvinfer1::DynamicPluginTensorDesc dynamic_desc(
    const nvinfer1::PluginTensorDesc& desc, const nvinfer1::Dims& max) {
    nvinfer1::DynamicPluginTensorDesc result{};
    result.desc = desc;
    result.min = result.opt = result.max = max;
    for (int32_t i = 0; i < max.nbDims; ++i) {
        result.min.d[i] = std::min<int64_t>(max.d[i], 1);
        result.opt.d[i] = (max.d[i] + 1) / 2;
    }
    return result;
}

}  // namespace plugin_library
