// Calls the plugin as TensorRT would, from a program without TensorRT: create it from fields, ask for
// formats and workspace, serialize, create it anew for the runtime, attach it to a context, enqueue.
// A shared library with a C interface, so that tests can hand it the pointers of PyTorch tensors.
//
//   g++ -std=c++17 -shared -fPIC -isystem TENSORRT -isystem CUDA/include enqueue_shim.cpp -o libenqueue_shim.so -ldl
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorRTPhase;
using Build = nvinfer1::v_1_0::IPluginV3OneBuild;
using Runtime = nvinfer1::v_1_0::IPluginV3OneRuntime;

// enum class DataType has bfloat16 in every TensorRT 10 and later
constexpr DataType kFloatTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
constexpr int32_t kInputs = 4;
constexpr int64_t kUnknown = -1;  // how TensorRT writes a dimension that the data decides

thread_local std::string lastError;

// The context offers nothing: the operator takes all its memory through the workspace.
class BareContext : public nvinfer1::IPluginResourceContext {
public:
    nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

// Fields that own their bytes, as an engine file does. A string has no NUL behind it there.
class OwnedFields {
public:
    void add(const char* name, int32_t value) { add(name, &value, sizeof value, PluginFieldType::kINT32, 1); }
    void add(const char* name, const char* text) {
        add(name, text, std::strlen(text), PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(text)));
    }
    void add(const char* name, const void* data, size_t bytes, PluginFieldType type, int32_t length) {
        const auto* first = static_cast<const char*>(data);
        entries.push_back({name, std::vector<char>(first, first + bytes), type, length});
    }
    nvinfer1::PluginFieldCollection collection() {
        fields.clear();
        for (const Entry& entry : entries) {
            fields.emplace_back(entry.name.c_str(), entry.bytes.data(), entry.type, entry.length);
        }
        return {static_cast<int32_t>(fields.size()), fields.data()};
    }

private:
    struct Entry {
        std::string name;
        std::vector<char> bytes;
        PluginFieldType type;
        int32_t length;
    };
    std::vector<Entry> entries;
    std::vector<PluginField> fields;
};

size_t bytesOf(PluginFieldType type) {
    switch (type) {
        case PluginFieldType::kINT8:
        case PluginFieldType::kCHAR:
            return 1;
        case PluginFieldType::kINT32:
        case PluginFieldType::kFLOAT32:
            return 4;
        case PluginFieldType::kINT64:
        case PluginFieldType::kFLOAT64:
            return 8;
        default:
            return 0;
    }
}

Dims dims(std::initializer_list<int64_t> values) {
    Dims result{};
    for (int64_t value : values) {
        result.d[result.nbDims++] = value;
    }
    return result;
}

PluginTensorDesc describe(DataType type, const Dims& shape) {
    PluginTensorDesc desc{};
    desc.dims = shape;
    desc.type = type;
    desc.format = nvinfer1::TensorFormat::kLINEAR;
    desc.scale = 1.0F;
    return desc;
}

}  // namespace

extern "C" {

struct shim_attributes {
    const char* selection;
    const char* reduction;
    int32_t num_prefix_tokens;
    int32_t capacity;
    int32_t multiple_of;
    int32_t opt_tokens;
    int32_t max_tokens;
};

struct shim_shape {
    int64_t batch;
    int64_t num_tokens;
    int64_t dim;
    int64_t feature_dim;
    int64_t num_thresholds;
    int32_t dtype;  // as in simprune.h: float32, float16, bfloat16
};

struct shim_plugin {
    std::unique_ptr<nvinfer1::IPluginV3> built;     // what the builder asks
    std::unique_ptr<nvinfer1::IPluginV3> restored;  // what an engine file gives back
    std::unique_ptr<nvinfer1::IPluginV3> attached;  // what an execution context runs
    BareContext context;
    int32_t prefix = 0;
    int32_t capacity = 0;
    int32_t outputs = 0;
};

#define SHIM_API __attribute__((visibility("default")))

SHIM_API const char* shim_error() {
    return lastError.c_str();
}
SHIM_API void shim_close(shim_plugin* plugin);

}  // extern "C"

namespace {

struct Descriptions {
    std::vector<PluginTensorDesc> in;
    std::vector<PluginTensorDesc> out;
};

Descriptions descriptions(const shim_plugin& plugin, const shim_shape& shape) {
    const DataType type = kFloatTypes[shape.dtype];
    const int64_t slots = plugin.capacity > 0 ? plugin.prefix + plugin.capacity : kUnknown;
    Descriptions result;
    result.in = {
        describe(type, dims({shape.batch, shape.num_tokens, shape.dim})),
        describe(type, dims({shape.batch, shape.num_tokens, shape.feature_dim})),
        describe(DataType::kFLOAT, dims({shape.batch, shape.num_tokens})),
        describe(DataType::kFLOAT, dims({shape.num_thresholds})),
    };
    result.out = {
        describe(type, dims({shape.batch, slots, shape.dim})),
        describe(DataType::kFLOAT, dims({shape.batch, slots})),
        describe(DataType::kINT64, dims({shape.batch, slots})),
        describe(DataType::kINT64, dims({shape.batch, shape.num_tokens})),
    };
    if (plugin.capacity == 0) {
        result.out.push_back(describe(DataType::kINT32, dims({})));
    }
    return result;
}

std::vector<DynamicPluginTensorDesc> dynamic(const std::vector<PluginTensorDesc>& descs) {
    std::vector<DynamicPluginTensorDesc> result;
    for (const PluginTensorDesc& desc : descs) {
        DynamicPluginTensorDesc one{};
        one.desc = desc;
        one.min = one.opt = one.max = desc.dims;
        result.push_back(one);
    }
    return result;
}

shim_plugin* fail(shim_plugin* plugin, const std::string& message) {
    lastError = message;
    shim_close(plugin);
    return nullptr;
}

}  // namespace

extern "C" {

SHIM_API void shim_close(shim_plugin* plugin) {
    delete plugin;
}

// NULL where something refused; shim_error() says what. The library stays loaded.
SHIM_API shim_plugin* shim_open(const char* library, const shim_attributes* attributes) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        return fail(nullptr, dlerror());
    }
    using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
    auto getCreators = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"));
    if (getCreators == nullptr) {
        return fail(nullptr, std::string(library) + " has no getCreators: it was built without the plugin");
    }
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
    nvinfer1::IPluginCreatorV3One* creator = nullptr;
    for (int32_t i = 0; i < count; ++i) {
        if (std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0) {
            auto* candidate = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
            if (std::strcmp(candidate->getPluginName(), "SimilarityPrune") == 0 &&
                std::strcmp(candidate->getPluginVersion(), "2") == 0) {
                creator = candidate;
            }
        }
    }
    if (creator == nullptr) {
        return fail(nullptr, "none of " + std::to_string(count) + " creators makes SimilarityPrune, version 2");
    }

    OwnedFields given;
    given.add("num_prefix_tokens", attributes->num_prefix_tokens);
    given.add("selection", attributes->selection);
    given.add("reduction", attributes->reduction);
    given.add("capacity", attributes->capacity);
    given.add("multiple_of", attributes->multiple_of);
    given.add("opt_tokens", attributes->opt_tokens);
    given.add("max_tokens", attributes->max_tokens);
    const nvinfer1::PluginFieldCollection fields = given.collection();

    auto* plugin = new shim_plugin;
    plugin->prefix = attributes->num_prefix_tokens;
    plugin->capacity = attributes->capacity;
    plugin->built.reset(creator->createPlugin("layer", &fields, TensorRTPhase::kBUILD));
    if (plugin->built == nullptr) {
        return fail(plugin, "createPlugin refused the fields for the build phase");
    }
    auto* build = static_cast<Build*>(plugin->built->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* runtime = static_cast<Runtime*>(plugin->built->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    if (build == nullptr || runtime == nullptr) {
        return fail(plugin, "the plugin lacks the build or the runtime capability");
    }
    plugin->outputs = build->getNbOutputs();
    const int32_t expected = plugin->capacity > 0 ? 4 : 5;
    if (plugin->outputs != expected) {
        return fail(
            plugin, "the plugin has " + std::to_string(plugin->outputs) + " outputs, not " + std::to_string(expected));
    }

    const nvinfer1::PluginFieldCollection* kept = runtime->getFieldsToSerialize();
    if (kept == nullptr) {
        return fail(plugin, "getFieldsToSerialize gave nothing");
    }
    OwnedFields serialized;
    for (int32_t i = 0; i < kept->nbFields; ++i) {
        const PluginField& field = kept->fields[i];
        if (bytesOf(field.type) == 0) {
            return fail(plugin, std::string("the field ") + field.name + " is serialized with a type not known here");
        }
        serialized.add(field.name, field.data, bytesOf(field.type) * field.length, field.type, field.length);
    }
    const nvinfer1::PluginFieldCollection restored = serialized.collection();
    plugin->restored.reset(creator->createPlugin("layer", &restored, TensorRTPhase::kRUNTIME));
    if (plugin->restored == nullptr) {
        return fail(plugin, "createPlugin refused its own serialized fields");
    }
    auto* engine = static_cast<Runtime*>(plugin->restored->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    plugin->attached.reset(engine == nullptr ? nullptr : engine->attachToContext(&plugin->context));
    if (plugin->attached == nullptr) {
        return fail(plugin, "attachToContext gave nothing");
    }
    return plugin;
}

// Number of outputs, the size tensor among them.
SHIM_API int32_t shim_outputs(const shim_plugin* plugin) {
    return plugin->outputs;
}

// Bytes of workspace for shapes up to `largest`; -1 where the plugin refuses the formats or shapes.
SHIM_API int64_t shim_workspace(shim_plugin* plugin, const shim_shape* largest) {
    auto* build = static_cast<Build*>(plugin->built->getCapabilityInterface(PluginCapabilityType::kBUILD));
    const Descriptions descs = descriptions(*plugin, *largest);
    const std::vector<DynamicPluginTensorDesc> in = dynamic(descs.in);
    const std::vector<DynamicPluginTensorDesc> out = dynamic(descs.out);
    std::vector<DynamicPluginTensorDesc> all = in;
    all.insert(all.end(), out.begin(), out.end());
    for (int32_t position = 0; position < static_cast<int32_t>(all.size()); ++position) {
        if (!build->supportsFormatCombination(position, all.data(), kInputs, plugin->outputs)) {
            lastError = "the plugin does not support the format at position " + std::to_string(position);
            return -1;
        }
    }
    std::vector<DataType> types(plugin->outputs);
    const DataType given[kInputs] = {descs.in[0].type, descs.in[1].type, descs.in[2].type, descs.in[3].type};
    if (build->getOutputDataTypes(types.data(), plugin->outputs, given, kInputs) != 0) {
        lastError = "getOutputDataTypes refused the input types";
        return -1;
    }
    for (int32_t i = 0; i < plugin->outputs; ++i) {
        if (types[i] != descs.out[i].type) {
            lastError = "getOutputDataTypes and supportsFormatCombination disagree at output " + std::to_string(i);
            return -1;
        }
    }
    if (build->configurePlugin(in.data(), kInputs, out.data(), plugin->outputs) != 0) {
        lastError = "configurePlugin refused the shapes";
        return -1;
    }
    return static_cast<int64_t>(build->getWorkspaceSize(in.data(), kInputs, out.data(), plugin->outputs));
}

// 0 where the plugin took it. Inputs: tokens, features, log_size, threshold. With capacity 0 outputs[4]
// receives the number of slots.
SHIM_API int32_t shim_enqueue(
    shim_plugin* plugin, const shim_shape* shape, const void* const* inputs, void* const* outputs, void* workspace,
    void* stream) {
    auto* runtime = static_cast<Runtime*>(plugin->attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    const Descriptions descs = descriptions(*plugin, *shape);
    if (runtime->onShapeChange(descs.in.data(), kInputs, descs.out.data(), plugin->outputs) != 0) {
        lastError = "onShapeChange refused the shapes";
        return 1;
    }
    const int32_t status = runtime->enqueue(
        descs.in.data(), descs.out.data(), inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
    if (status != 0) {
        lastError = "enqueue returned " + std::to_string(status);
    }
    return status;
}

}  // extern "C"
