// Fields good and bad, what a plugin says of itself, serialization, and the loggers of both TensorRT majors.
#include "check.h"
#include "plugin_library.h"

#include <algorithm>
#include <limits>

using namespace plugin_library;
using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

namespace {

constexpr int32_t kMostInt = std::numeric_limits<int32_t>::max();

std::string text_of(const nvinfer1::PluginField& field) {
    if (field.type == PluginFieldType::kINT32) {
        int32_t value = 0;
        std::memcpy(&value, field.data, sizeof value);
        return std::string(field.name) + "=" + std::to_string(value);
    }
    return std::string(field.name) + "=" + std::string(static_cast<const char*>(field.data), field.length);
}

std::string serialized(nvinfer1::IPluginV3& plugin) {
    const nvinfer1::PluginFieldCollection* fields = runtime(plugin).getFieldsToSerialize();
    std::string all;
    for (int32_t i = 0; i < fields->nbFields; ++i) all += text_of(fields->fields[i]) + " ";
    return all;
}

void creator_describes_itself() {
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
    CHECK_EQUAL(count, 1);
    CHECK(creators[0] != nullptr);
    CHECK_EQUAL(std::string(creators[0]->getInterfaceInfo().kind), "PLUGIN CREATOR_V3ONE");
    CHECK_EQUAL(std::string(creator().getPluginName()), "SimilarityPrune");
    CHECK_EQUAL(std::string(creator().getPluginVersion()), "2");
    CHECK_EQUAL(std::string(creator().getPluginNamespace()), "");
    const nvinfer1::PluginFieldCollection* fields = creator().getFieldNames();
    std::string names;
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        const bool text = fields->fields[i].type == PluginFieldType::kCHAR;
        CHECK(text || fields->fields[i].type == PluginFieldType::kINT32);
        names += std::string(fields->fields[i].name) + (text ? ":string " : ":int32 ");
    }
    CHECK_EQUAL(
        names,
        "num_prefix_tokens:int32 selection:string reduction:string capacity:int32 multiple_of:int32 opt_tokens:int32 "
        "max_tokens:int32 ");
}

void good_fields() {
    const std::string defaults =
        "num_prefix_tokens=1 selection=pairs reduction=merge capacity=0 multiple_of=1 opt_tokens=0 max_tokens=0 ";
    const struct {
        Fields fields;
        std::string serialized;
    } cases[] = {
        {Fields().add("num_prefix_tokens", 1), defaults},
        {Fields().add("num_prefix_tokens", int64_t{1}), defaults},
        // A string with and without its NUL
        {Fields().add("num_prefix_tokens", 1).add("selection", "pairs").add("reduction", std::string("merge\0", 6)),
         defaults},
        {Fields().add("plugin_version", "2").add("plugin_namespace", "").add("num_prefix_tokens", 1), defaults},
        {Fields()
             .add("num_prefix_tokens", 1)
             .add("plugin_version", std::string("2\0", 2))
             .add_without_data("plugin_namespace"),
         defaults},
        {Fields()
             .add("max_tokens", int64_t{577})
             .add("opt_tokens", 300)
             .add("multiple_of", 8)
             .add("capacity", 64)
             .add("reduction", "drop")
             .add("selection", std::string("redundancy\0", 11))
             .add("num_prefix_tokens", 5),
         "num_prefix_tokens=5 selection=redundancy reduction=drop capacity=64 multiple_of=8 opt_tokens=300 "
         "max_tokens=577 "},
        {Fields()
             .add("num_prefix_tokens", 0)
             .add("capacity", 4096)
             .add("multiple_of", kMostInt)
             .add("opt_tokens", 1)
             .add("max_tokens", 4096),
         "num_prefix_tokens=0 selection=pairs reduction=merge capacity=4096 multiple_of=2147483647 opt_tokens=1 "
         "max_tokens=4096 "},
    };
    for (const auto& one : cases) {
        for (const TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
            const PluginPointer plugin = create(one.fields, phase);
            if (!CHECK(plugin != nullptr)) continue;
            CHECK_EQUAL(serialized(*plugin), one.serialized);
            // What an engine file gives back, and copies, and copies of them
            const PluginPointer restored = create(runtime(*plugin).getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
            const PluginPointer copy(restored->clone());
            const PluginPointer attached(runtime(*copy).attachToContext(nullptr));
            for (const PluginPointer* each : {&restored, &copy, &attached}) {
                CHECK_EQUAL(serialized(**each), one.serialized);
                CHECK_EQUAL(
                    std::string(build(**each).getTimingCacheID()), std::string(build(*plugin).getTimingCacheID()));
            }
        }
    }
    CHECK_EQUAL(logged(), "");
}

// A copy must not point into the one that it was taken from.
void copies_outlive_their_source() {
    PluginPointer source = create(Fields().add("num_prefix_tokens", 7).add("selection", "redundancy"));
    const PluginPointer copy(source->clone());
    const std::string before = serialized(*source);
    source.reset();
    CHECK_EQUAL(serialized(*copy), before);
}

void bad_fields() {
    const float real = 1.0f;
    const int32_t two[] = {1, 2};
    const nvinfer1::PluginField no_name(nullptr, two, PluginFieldType::kINT32, 1);
    const auto with_prefix = [] { return Fields().add("num_prefix_tokens", 1); };
    const struct {
        Fields fields;
        const char* message;
    } cases[] = {
        {Fields(), "num_prefix_tokens is missing"},
        {Fields().add("selection", "pairs").add("capacity", 10), "num_prefix_tokens is missing"},
        {Fields().add("num_prefix_tokens", -1), "num_prefix_tokens -1 is outside [0, "},
        {Fields().add("num_prefix_tokens", kMostInt), "num_prefix_tokens 2147483647 is outside [0, "},
        {Fields().add("num_prefix_tokens", int64_t{1} << 33), "num_prefix_tokens 8589934592 is outside [0, "},
        {Fields().add("num_prefix_tokens", PluginFieldType::kFLOAT32, &real, sizeof real, 1),
         "num_prefix_tokens is of type float32: give an int32"},
        {Fields().add("num_prefix_tokens", "1"), "num_prefix_tokens is of type string: give an int32"},
        {Fields().add("num_prefix_tokens", PluginFieldType::kINT32, two, sizeof two, 2),
         "num_prefix_tokens has 2 values: give one"},
        {Fields().add("num_prefix_tokens", PluginFieldType::kINT32, nullptr, 0, 0),
         "num_prefix_tokens has 0 values: give one"},
        {Fields().add_without_data("num_prefix_tokens"), "num_prefix_tokens has no data"},
        {with_prefix().add("num_prefix_tokens", 1), "num_prefix_tokens is given twice"},
        {with_prefix().add("selection", "nearest"),
         "selection \"nearest\" is not known: give \"pairs\" or \"redundancy\""},
        {with_prefix().add("selection", "Pairs"), "selection \"Pairs\" is not known"},
        {with_prefix().add("selection", ""), "selection \"\" is not known"},
        {with_prefix().add("selection", std::string("pairs\0\0", 7)), "is not known"},
        {with_prefix().add("selection", std::string("pa\nirs")), "selection \"pa?irs\" is not known"},
        {with_prefix().add("selection", PluginFieldType::kCHAR, "pairs", 5, -1), "selection \"\" is not known"},
        {with_prefix().add("selection", "cover"),
         "selection \"cover\" is gone, and the file is from before version 2 of this operator: export the model"},
        {with_prefix().add("selection", std::string("cover\0", 6)), "selection \"cover\" is gone"},
        {with_prefix().add("plugin_version", "1"),
         "plugin_version is \"1\": the file is from before version 2 of this operator: export the model"},
        {with_prefix().add("plugin_version", std::string("1\0", 2)), "plugin_version is \"1\""},
        {with_prefix().add("plugin_version", "3"),
         "plugin_version \"3\" is not \"2\", which this library has: build the library with the simprune-deploy"},
        {with_prefix().add("plugin_version", ""), "plugin_version \"\" is not \"2\""},
        {with_prefix().add("plugin_version", 2), "plugin_version is of type int32: give a string"},
        {with_prefix().add_without_data("plugin_version"), "plugin_version has no data"},
        {with_prefix().add("selection", 0), "selection is of type int32: give a string"},
        {with_prefix().add("reduction", "average"), "reduction \"average\" is not known: give \"merge\" or \"drop\""},
        {with_prefix().add("capacity", -1), "capacity -1 is outside [0, 4096]"},
        {with_prefix().add("capacity", 4097), "capacity 4097 is outside [0, 4096]"},
        {with_prefix().add("multiple_of", 0), "multiple_of 0 is outside [1, "},
        {with_prefix().add("multiple_of", -8), "multiple_of -8 is outside [1, "},
        {with_prefix().add("opt_tokens", -1), "opt_tokens -1 is outside [0, "},
        {with_prefix().add("opt_tokens", 1), "opt_tokens 1 leaves no patches after 1 prefix tokens"},
        {with_prefix().add("max_tokens", -1), "max_tokens -1 is outside [0, "},
        {with_prefix().add("max_tokens", 1), "max_tokens 1 leaves no patches after 1 prefix tokens"},
        {with_prefix().add("max_tokens", 4098), "max_tokens 4098 is more than 1 prefix tokens and the 4096 patches"},
        {with_prefix().add("opt_tokens", 300).add("max_tokens", 197), "opt_tokens 300 is more than max_tokens 197"},
        {with_prefix().add("treshold", 1), "field \"treshold\" is not known: the fields are num_prefix_tokens"},
        {with_prefix().add("", 1), "field \"\" is not known"},
    };
    for (const auto& one : cases) {
        for (const TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
            loggers::messages.clear();
            CHECK(create(one.fields, phase) == nullptr);
            if (CHECK_EQUAL(loggers::messages.size(), 1u)) {
                CHECK_EQUAL(loggers::messages[0].severity, 1);
                CHECK_CONTAINS(loggers::messages[0].text, one.message);
                CHECK_EQUAL(loggers::messages[0].text.rfind("SimilarityPrune: ", 0), 0u);
                CHECK(loggers::messages[0].text.find('\n') == std::string::npos);
            }
        }
    }
    nvinfer1::PluginFieldCollection broken{};
    logged();
    CHECK(create(nullptr) == nullptr);
    CHECK_CONTAINS(logged(), "there are no fields");
    broken.nbFields = -1;
    CHECK(create(&broken) == nullptr);
    CHECK_CONTAINS(logged(), "there are no fields");
    broken.nbFields = 1;
    CHECK(create(&broken) == nullptr);
    CHECK_CONTAINS(logged(), "there are no fields");
    broken.fields = &no_name;
    CHECK(create(&broken) == nullptr);
    CHECK_CONTAINS(logged(), "a field has no name");
    const std::string endless(5000, 'x');
    for (const char* text : {"selection", "plugin_version"}) {
        CHECK(create(with_prefix().add(text, endless)) == nullptr);
        CHECK(logged().size() < 300);
    }
    CHECK(create(with_prefix().add(endless.c_str(), 1)) == nullptr);
    CHECK(logged().size() < 300);
}

void plugin_describes_itself() {
    const PluginPointer dynamic = create(Fields().add("num_prefix_tokens", 1));
    const PluginPointer fixed = create(Fields().add("num_prefix_tokens", 1).add("capacity", 10));
    CHECK_EQUAL(std::string(core(*dynamic).getPluginName()), "SimilarityPrune");
    CHECK_EQUAL(std::string(core(*dynamic).getPluginVersion()), "2");
    CHECK_EQUAL(std::string(core(*dynamic).getPluginNamespace()), "");
    CHECK_EQUAL(std::string(core(*dynamic).getInterfaceInfo().kind), "PLUGIN_V3ONE_CORE");
    CHECK_EQUAL(std::string(build(*dynamic).getInterfaceInfo().kind), "PLUGIN_V3ONE_BUILD");
    CHECK_EQUAL(std::string(runtime(*dynamic).getInterfaceInfo().kind), "PLUGIN_V3ONE_RUNTIME");
    CHECK_EQUAL(build(*dynamic).getNbOutputs(), 5);
    CHECK_EQUAL(build(*fixed).getNbOutputs(), 4);
    CHECK_EQUAL(build(*dynamic).getNbTactics(), 0);
    CHECK_EQUAL(runtime(*dynamic).setTactic(0), 0);
    logged();
    CHECK(dynamic->getCapabilityInterface(static_cast<nvinfer1::PluginCapabilityType>(3)) == nullptr);
    CHECK_CONTAINS(logged(), "capability 3 is not known");
}

// Everything that changes the work, and nothing else, changes the timing cache's key.
void timing_cache_ids() {
    std::vector<std::string> ids;
    const auto id_of = [](const Fields& fields) { return std::string(build(*create(fields)).getTimingCacheID()); };
    const auto base = [] { return Fields().add("num_prefix_tokens", 1); };
    ids.push_back(id_of(base()));
    ids.push_back(id_of(Fields().add("num_prefix_tokens", 2)));
    ids.push_back(id_of(base().add("selection", "redundancy")));
    ids.push_back(id_of(base().add("reduction", "drop")));
    ids.push_back(id_of(base().add("capacity", 1)));
    ids.push_back(id_of(base().add("multiple_of", 2)));
    ids.push_back(id_of(base().add("opt_tokens", 2)));
    ids.push_back(id_of(base().add("max_tokens", 2)));
    for (size_t i = 0; i < ids.size(); ++i) {
        for (size_t j = 0; j < i; ++j) CHECK(ids[i] != ids[j]);
    }
    CHECK_EQUAL(id_of(base().add("selection", "pairs").add("multiple_of", 1)), ids[0]);
    // The longest is not cut off
    const std::string longest = id_of(Fields()
                                          .add("num_prefix_tokens", kMostInt - 4096)
                                          .add("selection", "redundancy")
                                          .add("multiple_of", kMostInt)
                                          .add("opt_tokens", kMostInt - 1)
                                          .add("max_tokens", kMostInt));
    CHECK_CONTAINS(longest, "max_tokens=2147483647");
}

void output_types() {
    const PluginPointer dynamic = create(Fields().add("num_prefix_tokens", 1));
    const PluginPointer fixed = create(Fields().add("num_prefix_tokens", 1).add("capacity", 10));
    for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        const DataType in[] = {type, type, DataType::kFLOAT, DataType::kFLOAT};
        DataType out[5] = {};
        CHECK_EQUAL(build(*dynamic).getOutputDataTypes(out, 5, in, 4), 0);
        CHECK(out[0] == type && out[1] == DataType::kFLOAT && out[2] == DataType::kINT64);
        CHECK(out[3] == DataType::kINT64 && out[4] == DataType::kINT32);
        CHECK_EQUAL(build(*fixed).getOutputDataTypes(out, 4, in, 4), 0);
    }
    constexpr DataType kFloat = DataType::kFLOAT, kHalf = DataType::kHALF;
    const struct {
        DataType in[4];
        const char* message;
    } refused[] = {
        {{DataType::kINT8, DataType::kINT8, kFloat, kFloat}, "tokens are int8"},
        {{DataType::kFP8, DataType::kFP8, kFloat, kFloat}, "tokens are of an unsupported type"},
        {{kHalf, kFloat, kFloat, kFloat}, "features are float32 and tokens float16: they must be of one type"},
        {{kFloat, kHalf, kFloat, kFloat}, "features are float16 and tokens float32: they must be of one type"},
        {{DataType::kBF16, kHalf, kFloat, kFloat}, "features are float16 and tokens bfloat16"},
        {{kHalf, DataType::kFP8, kFloat, kFloat}, "features are of an unsupported type and tokens float16"},
        {{kHalf, kHalf, kHalf, kFloat}, "log_size is float16: it must be float32"},
        {{kHalf, kHalf, kFloat, kHalf}, "threshold is float16: it must be float32"},
    };
    DataType out[5] = {};
    logged();
    for (const auto& one : refused) {
        CHECK(build(*dynamic).getOutputDataTypes(out, 5, one.in, 4) != 0);
        const std::string message = logged();
        CHECK_CONTAINS(message, one.message);
        CHECK_EQUAL(std::count(message.begin(), message.end(), '\n'), 1);
    }
    const DataType in[] = {kHalf, kHalf, kFloat, kFloat, kFloat};
    CHECK(build(*dynamic).getOutputDataTypes(out, 4, in, 4) != 0);
    CHECK_CONTAINS(logged(), "4 outputs: with capacity 0 the plugin has 5");
    CHECK(build(*fixed).getOutputDataTypes(out, 5, in, 4) != 0);
    CHECK_CONTAINS(logged(), "5 outputs: with capacity 10 the plugin has 4");
    CHECK(build(*dynamic).getOutputDataTypes(out, 5, in, 3) != 0);
    CHECK_EQUAL(
        logged(),
        "SimilarityPrune: 3 inputs: the plugin has 4, tokens, features, log_size and threshold; the file is from "
        "before version 2 of this operator: export the model and build its engine again\n");
    CHECK(build(*dynamic).getOutputDataTypes(out, 5, in, 5) != 0);
    CHECK_EQUAL(logged(), "SimilarityPrune: 5 inputs: the plugin has 4, tokens, features, log_size and threshold\n");
}

// TensorRT's question: which types and formats at each position, what stands behind it being garbage.
void formats() {
    constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16,  DataType::kINT8,
                                   DataType::kINT32, DataType::kBOOL, DataType::kINT64, DataType::kFP8};
    constexpr TensorFormat kFormats[] = {
        TensorFormat::kLINEAR, TensorFormat::kCHW2, TensorFormat::kHWC8, TensorFormat::kCHW32};
    for (const int32_t outputs : {4, 5}) {
        const PluginPointer plugin =
            create(Fields().add("num_prefix_tokens", 1).add("capacity", outputs == 4 ? 10 : 0));
        for (const DataType tokens : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
            const DataType expected[] = {tokens,           tokens,           DataType::kFLOAT, DataType::kFLOAT, tokens,
                                         DataType::kFLOAT, DataType::kINT64, DataType::kINT64, DataType::kINT32};
            for (int32_t position = 0; position < 4 + outputs; ++position) {
                // Only what may be looked at is there: a look behind it is out of bounds
                std::vector<DynamicPluginTensorDesc> all(position + 1);
                for (int32_t i = 0; i < position; ++i) {
                    all[i] = dynamic_desc(desc(expected[i], dims({})), dims({}));
                }
                for (const DataType type : kTypes) {
                    for (const TensorFormat format : kFormats) {
                        all[position] = dynamic_desc(desc(type, dims({}), format), dims({}));
                        const bool among = std::count(std::begin(kTypes), std::begin(kTypes) + 3, type) > 0;
                        const bool fits = position == 0 ? among : type == expected[position];
                        CHECK_EQUAL(
                            build(*plugin).supportsFormatCombination(position, all.data(), 4, outputs),
                            fits && format == TensorFormat::kLINEAR);
                    }
                }
            }
        }
        const std::vector<DynamicPluginTensorDesc> all(10, dynamic_desc(desc(DataType::kFLOAT, dims({})), dims({})));
        CHECK(!build(*plugin).supportsFormatCombination(-1, all.data(), 4, outputs));
        CHECK(!build(*plugin).supportsFormatCombination(4 + outputs, all.data(), 4, outputs));
        CHECK(!build(*plugin).supportsFormatCombination(0, all.data(), 3, outputs));
        CHECK(!build(*plugin).supportsFormatCombination(0, all.data(), 4, 9 - outputs));
    }
    logged();
}

// ---- Loggers

class Unknown {
public:
    virtual void function() { CHECK(!"a function of an unknown finder was called"); }
    virtual ~Unknown() = default;
};

// Whether a message reaches the logger, that is, not stderr
bool reaches_logger() {
    loggers::messages.clear();
    create(Fields());
    return loggers::messages.size() == 1;
}

void loggers_of_both_majors() {
    setLoggerFinder(loggers::tensorrt10_finder());
    CHECK(reaches_logger());
    loggers::lose_tensorrt10_logger(true);
    CHECK(!reaches_logger());
    setLoggerFinder(loggers::tensorrt11_finder());
    CHECK(reaches_logger());
    CHECK_EQUAL(loggers::messages[0].severity, 1);
    CHECK_CONTAINS(loggers::messages[0].text, "SimilarityPrune: num_prefix_tokens is missing");
    loggers::lose_tensorrt11_logger(true);
    CHECK(!reaches_logger());
    loggers::lose_tensorrt11_logger(false);
    Unknown unknown;
    setLoggerFinder(&unknown);
    CHECK(!reaches_logger());
    setLoggerFinder(loggers::tensorrt11_finder());
    setLoggerFinder(nullptr);
    CHECK(!reaches_logger());
    setLoggerFinder(loggers::throwing_finder());
    CHECK(!reaches_logger());
    loggers::lose_tensorrt10_logger(false);
    setLoggerFinder(loggers::tensorrt10_finder());
}

}  // namespace

int main() {
    setLoggerFinder(loggers::tensorrt11_finder());
    creator_describes_itself();
    good_fields();
    copies_outlive_their_source();
    bad_fields();
    plugin_describes_itself();
    timing_cache_ids();
    output_types();
    formats();
    loggers_of_both_majors();
    return check::result();
}
