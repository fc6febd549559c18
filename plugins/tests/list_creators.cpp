// Loads a plugin library as TensorRT does and prints, as JSON, its creators and what its plugins say.
//
//   list_creators LIBRARY
//
// Exits with 1 if the library cannot be loaded, if a plugin is not created from good fields, or if
// one is from bad fields. Needs the TensorRT headers and -ldl alone. As a shared library it offers
// describe_plugin() for a plugin that somebody else has created.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <typeinfo>
#include <vector>

namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorFormat;

constexpr int32_t kInputs = 4;

std::string quoted(const std::string& text) {
    std::string result = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') result += '\\';
        result += static_cast<unsigned char>(c) < ' ' ? '?' : c;
    }
    return result + "\"";
}

std::string joined(const std::vector<std::string>& parts, const char* open, const char* close) {
    std::string result = open;
    for (size_t i = 0; i < parts.size(); ++i) result += (i > 0 ? ", " : "") + parts[i];
    return result + close;
}

std::string name_of(PluginFieldType type) {
    switch (type) {
        case PluginFieldType::kINT32:
            return "int32";
        case PluginFieldType::kCHAR:
            return "string";
        default:
            return "type " + std::to_string(static_cast<int>(type));
    }
}

std::string name_of(DataType type) {
    switch (type) {
        case DataType::kFLOAT:
            return "float32";
        case DataType::kHALF:
            return "float16";
        case DataType::kBF16:
            return "bfloat16";
        case DataType::kINT8:
            return "int8";
        case DataType::kINT32:
            return "int32";
        case DataType::kINT64:
            return "int64";
        default:
            return "type " + std::to_string(static_cast<int>(type));
    }
}

std::string value_of(const PluginField& field) {
    if (field.type == PluginFieldType::kCHAR) {
        return quoted(std::string(static_cast<const char*>(field.data), field.length));
    }
    int32_t value = 0;
    std::memcpy(&value, field.data, sizeof value);
    return std::to_string(value);
}

std::string output_types(const nvinfer1::IPluginV3OneBuild& build) {
    std::vector<std::string> all;
    for (const DataType tokens : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8}) {
        const DataType in[kInputs] = {tokens, tokens, DataType::kFLOAT, DataType::kFLOAT};
        std::vector<DataType> out(build.getNbOutputs());
        std::vector<std::string> names;
        std::string answer = "null";
        if (build.getOutputDataTypes(out.data(), build.getNbOutputs(), in, kInputs) == 0) {
            for (const DataType type : out) names.push_back(quoted(name_of(type)));
            answer = joined(names, "[", "]");
        }
        all.push_back(quoted(name_of(tokens)) + ": " + answer);
    }
    return joined(all, "{", "}");
}

// The types that each position takes in linear format, after the first of those before it; and how
// many it takes in another format.
std::string formats(nvinfer1::IPluginV3OneBuild& build) {
    constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF,  DataType::kBF16,
                                   DataType::kINT8,  DataType::kINT32, DataType::kINT64};
    std::vector<DynamicPluginTensorDesc> descs(kInputs + build.getNbOutputs());
    std::vector<std::string> positions;
    const auto count = static_cast<int32_t>(descs.size());
    for (int32_t position = 0; position < count; ++position) {
        DynamicPluginTensorDesc first{};
        std::vector<std::string> names;
        int other_formats = 0;
        for (const DataType type : kTypes) {
            for (const TensorFormat format : {TensorFormat::kLINEAR, TensorFormat::kCHW2, TensorFormat::kHWC8}) {
                descs[position].desc.type = type;
                descs[position].desc.format = format;
                if (!build.supportsFormatCombination(position, descs.data(), kInputs, build.getNbOutputs())) continue;
                if (format != TensorFormat::kLINEAR) {
                    ++other_formats;
                    continue;
                }
                if (names.empty()) first = descs[position];
                names.push_back(quoted(name_of(type)));
            }
        }
        descs[position] = first;
        positions.push_back(
            "{\"linear\": " + joined(names, "[", "]") + ", \"others\": " + std::to_string(other_formats) + "}");
    }
    return joined(positions, "[", "]");
}

std::string describe(nvinfer1::IPluginV3& plugin) {
    auto* core = static_cast<nvinfer1::IPluginV3OneCore*>(plugin.getCapabilityInterface(PluginCapabilityType::kCORE));
    auto* build =
        static_cast<nvinfer1::IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto* runtime =
        static_cast<nvinfer1::IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    if (core == nullptr || build == nullptr || runtime == nullptr) return "null";
    const PluginFieldCollection* fields = runtime->getFieldsToSerialize();
    std::vector<std::string> serialized;
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        serialized.push_back(quoted(fields->fields[i].name) + ": " + value_of(fields->fields[i]));
    }
    return "{\"name\": " + quoted(core->getPluginName()) + ", \"version\": " + quoted(core->getPluginVersion()) +
           ", \"namespace\": " + quoted(core->getPluginNamespace()) +
           ", \"num_outputs\": " + std::to_string(build->getNbOutputs()) +
           ", \"timing_cache_id\": " + quoted(build->getTimingCacheID()) +
           ", \"output_types\": " + output_types(*build) + ", \"formats\": " + formats(*build) +
           ", \"serialized\": " + joined(serialized, "{", "}") + "}";
}

nvinfer1::IPluginV3* create(nvinfer1::IPluginCreatorV3One& creator, const std::vector<PluginField>& fields) {
    PluginFieldCollection collection{};
    collection.nbFields = static_cast<int32_t>(fields.size());
    collection.fields = fields.data();
    return creator.createPlugin("layer", &collection, nvinfer1::TensorRTPhase::kBUILD);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// A JSON text, which stays until the next call; for the address of an IPluginV3.
EXPORTED const char* describe_plugin(void* plugin) {
    static std::string text;
    text = describe(*static_cast<nvinfer1::IPluginV3*>(plugin));
    return text.c_str();
}

// By these TensorRT's Python bindings know what address they are asked for.
EXPORTED const void* plugin_type() {
    return &typeid(nvinfer1::IPluginV3);
}

EXPORTED const char* type_info_name() {
    return typeid(std::type_info).name();
}

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: list_creators LIBRARY\n");
        return 2;
    }
    void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    using GetCreators = nvinfer1::IPluginCreatorInterface* const*(int32_t&);
    auto* get_creators = reinterpret_cast<GetCreators*>(dlsym(library, "getCreators"));
    if (get_creators == nullptr || dlsym(library, "setLoggerFinder") == nullptr) {
        std::fprintf(stderr, "%s exports no getCreators and setLoggerFinder\n", argv[1]);
        return 1;
    }
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = get_creators(count);
    std::vector<std::string> described;
    bool as_expected = count > 0;
    for (int32_t i = 0; i < count; ++i) {
        if (std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) return 1;
        auto& creator = static_cast<nvinfer1::IPluginCreatorV3One&>(*creators[i]);
        std::vector<std::string> fields;
        const PluginFieldCollection* names = creator.getFieldNames();
        for (int32_t j = 0; j < names->nbFields; ++j) {
            fields.push_back(quoted(names->fields[j].name) + ": " + quoted(name_of(names->fields[j].type)));
        }
        const int32_t prefix = 1, negative = -1;
        nvinfer1::IPluginV3* good = create(creator, {{"num_prefix_tokens", &prefix, PluginFieldType::kINT32, 1}});
        nvinfer1::IPluginV3* bad = create(creator, {{"num_prefix_tokens", &negative, PluginFieldType::kINT32, 1}});
        as_expected = as_expected && good != nullptr && bad == nullptr;
        described.push_back(
            "{\"name\": " + quoted(creator.getPluginName()) + ", \"version\": " + quoted(creator.getPluginVersion()) +
            ", \"namespace\": " + quoted(creator.getPluginNamespace()) + ", \"fields\": " + joined(fields, "{", "}") +
            ", \"created_from_good_fields\": " + (good != nullptr ? "true" : "false") +
            ", \"created_from_bad_fields\": " + (bad != nullptr ? "true" : "false") +
            ", \"plugin\": " + (good != nullptr ? describe(*good) : "null") + "}");
        delete good;
        delete bad;
    }
    std::printf("%s\n", joined(described, "[", "]").c_str());
    dlclose(library);
    return as_expected ? 0 : 1;
}
