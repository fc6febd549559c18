#include "tensorrt_plugin.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <string_view>

#include "tensorrt_log.h"

namespace simprune {
namespace tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IDimensionExpr;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr const char* kName = "SimilarityPrune";
constexpr const char* kVersion = "2";
constexpr const char* kFormerVersion = "1";
constexpr const char* kNamespace = "";

constexpr int32_t kOk = 0;
constexpr int32_t kFailed = 1;

// Values of the C interface, by their names in the node
constexpr const char* kSelections[] = {"pairs", "redundancy"};
constexpr const char* kReductions[] = {"merge", "drop"};

constexpr int64_t kMostInt = std::numeric_limits<int32_t>::max();

struct Field {
    const char* name;
    int32_t Attributes::*value;
    const char* const* choices;  // two names, or null for a number
    int64_t least, most;
};

constexpr Field kFields[kNumFields] = {
    {"num_prefix_tokens", &Attributes::num_prefix_tokens, nullptr, 0, kMostInt - SIMPRUNE_MAX_PATCHES},
    {"selection", &Attributes::selection, kSelections, 0, 1},
    {"reduction", &Attributes::reduction, kReductions, 0, 1},
    {"capacity", &Attributes::capacity, nullptr, 0, SIMPRUNE_MAX_PATCHES},
    {"multiple_of", &Attributes::multiple_of, nullptr, 1, kMostInt},
    {"opt_tokens", &Attributes::opt_tokens, nullptr, 0, kMostInt},
    {"max_tokens", &Attributes::max_tokens, nullptr, 0, kMostInt},
};
constexpr int kPrefixField = 0;

// Attributes of a node that say which plugin it is; a front end may hand them over with the others
constexpr std::string_view kVersionField = "plugin_version", kNamespaceField = "plugin_namespace";

// What files from before version 2 have
constexpr std::string_view kFormerSelection = "cover";
constexpr int32_t kFormerInputs = 3;
constexpr const char* kExportAgain =
    "the file is from before version 2 of this operator: export the model and build its engine again";

const char* name_of(PluginFieldType type) {
    switch (type) {
        case PluginFieldType::kFLOAT16:
            return "float16";
        case PluginFieldType::kFLOAT32:
            return "float32";
        case PluginFieldType::kFLOAT64:
            return "float64";
        case PluginFieldType::kINT8:
            return "int8";
        case PluginFieldType::kINT16:
            return "int16";
        case PluginFieldType::kINT32:
            return "int32";
        case PluginFieldType::kINT64:
            return "int64";
        case PluginFieldType::kCHAR:
            return "string";
        default:
            return "unknown";
    }
}

const char* name_of(DataType type) {
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
            return "of an unsupported type";
    }
}

// Of the C interface's workspace.
constexpr size_t kWorkspaceAlignment = 256;

void* aligned(void* workspace) {
    const auto address = reinterpret_cast<uintptr_t>(workspace);
    return static_cast<uint8_t*>(workspace) +
           (kWorkspaceAlignment - address % kWorkspaceAlignment) % kWorkspaceAlignment;
}

long long number(int64_t value) {
    return static_cast<long long>(value);
}

// ---- Fields

bool read_number(const PluginField& given, const Field& field, Attributes& attributes) {
    int64_t value = 0;
    if (given.length != 1) {
        log_error("%s has %d values: give one", field.name, given.length);
        return false;
    }
    // Copied, because nothing promises that the data is aligned
    if (given.type == PluginFieldType::kINT32) {
        int32_t narrow = 0;
        std::memcpy(&narrow, given.data, sizeof narrow);
        value = narrow;
    } else if (given.type == PluginFieldType::kINT64) {
        std::memcpy(&value, given.data, sizeof value);
    } else {
        log_error("%s is of type %s: give an int32", field.name, name_of(given.type));
        return false;
    }
    if (value < field.least || value > field.most) {
        log_error(
            "%s %lld is outside [%lld, %lld]: give the node a value in there", field.name, number(value),
            number(field.least), number(field.most));
        return false;
    }
    attributes.*field.value = static_cast<int32_t>(value);
    return true;
}

// Of what is quoted from a file
constexpr size_t kMostShown = 64;

int shown(std::string_view text) {
    return static_cast<int>(std::min(text.size(), kMostShown));
}

bool read_text(const PluginField& given, std::string_view& text) {
    if (given.type != PluginFieldType::kCHAR) {
        log_error("%.64s is of type %s: give a string", given.name, name_of(given.type));
        return false;
    }
    text = {static_cast<const char*>(given.data), static_cast<size_t>(std::max(given.length, 0))};
    // Some front ends count the NUL behind a string, some do not
    if (!text.empty() && text.back() == '\0') text.remove_suffix(1);
    return true;
}

bool read_choice(const PluginField& given, const Field& field, Attributes& attributes) {
    std::string_view value;
    if (!read_text(given, value)) return false;
    for (int32_t choice = 0; choice < 2; ++choice) {
        if (value == field.choices[choice]) {
            attributes.*field.value = choice;
            return true;
        }
    }
    if (field.choices == kSelections && value == kFormerSelection) {
        log_error("%s \"%s\" is gone, and %s", field.name, kFormerSelection.data(), kExportAgain);
        return false;
    }
    log_error(
        "%s \"%.*s\" is not known: give \"%s\" or \"%s\"", field.name, shown(value), value.data(), field.choices[0],
        field.choices[1]);
    return false;
}

bool read_version(const PluginField& given) {
    std::string_view version;
    if (!read_text(given, version)) return false;
    if (version == kVersion) return true;
    if (version == kFormerVersion) {
        log_error("plugin_version is \"%s\": %s", kFormerVersion, kExportAgain);
    } else {
        log_error(
            "plugin_version \"%.*s\" is not \"%s\", which this library has: build the library with the "
            "simprune-deploy that exported the file",
            shown(version), version.data(), kVersion);
    }
    return false;
}

bool has_data(const PluginField& given) {
    if (given.data != nullptr) return true;
    log_error("%.64s has no data: give its value, or leave the field out", given.name);
    return false;
}

bool read_field(const PluginField& given, Attributes& attributes, std::array<bool, kNumFields>& seen) {
    if (given.name == nullptr) {
        log_error("a field has no name: give name, data, type and length of every field");
        return false;
    }
    for (int i = 0; i < kNumFields; ++i) {
        const Field& field = kFields[i];
        if (std::string_view(given.name) != field.name) continue;
        if (seen[i]) {
            log_error("%s is given twice: give it once", field.name);
            return false;
        }
        seen[i] = true;
        if (!has_data(given)) return false;
        return field.choices != nullptr ? read_choice(given, field, attributes) : read_number(given, field, attributes);
    }
    if (given.name == kVersionField) return has_data(given) && read_version(given);
    if (given.name == kNamespaceField) return true;
    log_error(
        "field \"%.64s\" is not known: the fields are num_prefix_tokens, selection, reduction, capacity, multiple_of, "
        "opt_tokens, max_tokens",
        given.name);
    return false;
}

// opt_tokens and max_tokens are numbers of tokens: there must be patches in them, but not too many.
bool takes_hint(const char* name, int64_t value, int64_t prefix) {
    if (value == 0) return true;
    if (value <= prefix) {
        log_error(
            "%s %lld leaves no patches after %lld prefix tokens: give more, or 0", name, number(value), number(prefix));
        return false;
    }
    if (value - prefix > SIMPRUNE_MAX_PATCHES) {
        log_error(
            "%s %lld is more than %lld prefix tokens and the %d patches that the plugin holds: give fewer, or build "
            "the engine from the ONNX function without the plugin",
            name, number(value), number(prefix), SIMPRUNE_MAX_PATCHES);
        return false;
    }
    return true;
}

bool read_fields(const PluginFieldCollection* fields, Attributes& attributes) {
    if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
        log_error("there are no fields: give num_prefix_tokens at least");
        return false;
    }
    std::array<bool, kNumFields> seen{};
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        if (!read_field(fields->fields[i], attributes, seen)) return false;
    }
    if (!seen[kPrefixField]) {
        log_error("num_prefix_tokens is missing: give the number of class, distillation and register tokens, or 0");
        return false;
    }
    const Attributes& a = attributes;
    if (!takes_hint("opt_tokens", a.opt_tokens, a.num_prefix_tokens)) return false;
    if (!takes_hint("max_tokens", a.max_tokens, a.num_prefix_tokens)) return false;
    if (a.max_tokens > 0 && a.opt_tokens > a.max_tokens) {
        log_error(
            "opt_tokens %d is more than max_tokens %d: give the usual number of tokens, and the largest", a.opt_tokens,
            a.max_tokens);
        return false;
    }
    return true;
}

// ---- Shapes

Shape shape_of(const DimsExprs& dims) {
    Shape shape{dims.nbDims, {}};
    for (int32_t i = 0; i < std::min(dims.nbDims, Dims::MAX_DIMS); ++i) {
        shape.d[i] = dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : Shape::kUnknown;
    }
    return shape;
}

Shape shape_of(const Dims& dims) {
    Shape shape{dims.nbDims, {}};
    for (int32_t i = 0; i < std::min(dims.nbDims, Dims::MAX_DIMS); ++i) {
        shape.d[i] = std::max(dims.d[i], Shape::kUnknown);
    }
    return shape;
}

// Of all inputs, of which get(i) gives what is asked for
template <class Get>
Shapes shapes_by(const Get& get) {
    return {shape_of(get(kTokens)), shape_of(get(kFeatures)), shape_of(get(kLogSize)), shape_of(get(kThreshold))};
}

Shapes shapes_of(const PluginTensorDesc* in) {
    return shapes_by([in](int i) -> const Dims& { return in[i].dims; });
}

Shapes network_shapes(const DynamicPluginTensorDesc* in) {
    return shapes_by([in](int i) -> const Dims& { return in[i].desc.dims; });
}

Shapes largest_shapes(const DynamicPluginTensorDesc* in) {
    return shapes_by([in](int i) -> const Dims& { return in[i].max; });
}

bool known(int64_t size) {
    return size != Shape::kUnknown;
}

bool disagree(int64_t a, int64_t b) {
    return known(a) && known(b) && a != b;
}

bool has_rank(const char* name, const Shape& shape, int32_t rank, const char* meaning) {
    if (shape.rank == rank) return true;
    log_error("%s has %d dimensions: it must have %d, %s", name, shape.rank, rank, meaning);
    return false;
}

int64_t any_known(std::initializer_list<int64_t> sizes) {
    const auto* found = std::find_if(sizes.begin(), sizes.end(), known);
    return found == sizes.end() ? Shape::kUnknown : *found;
}

bool same_counts(const char* first, const Shape& a, const char* second, const Shape& b) {
    if (!disagree(a.d[0], b.d[0]) && !disagree(a.d[1], b.d[1])) return true;
    log_error(
        "%s begin with sizes [%lld, %lld] and %s with [%lld, %lld] (-1: any): give as many images and tokens in both",
        first, number(a.d[0]), number(a.d[1]), second, number(b.d[0]), number(b.d[1]));
    return false;
}

// ---- Types

Types types_of(const PluginTensorDesc* in) {
    return {in[kTokens].type, in[kFeatures].type, in[kLogSize].type, in[kThreshold].type};
}

Types types_of(const DynamicPluginTensorDesc* in) {
    return {in[kTokens].desc.type, in[kFeatures].desc.type, in[kLogSize].desc.type, in[kThreshold].desc.type};
}

int32_t dtype_of(DataType type) {
    switch (type) {
        case DataType::kFLOAT:
            return SIMPRUNE_FLOAT32;
        case DataType::kHALF:
            return SIMPRUNE_FLOAT16;
        case DataType::kBF16:
            return SIMPRUNE_BFLOAT16;
        default:
            return -1;
    }
}

}  // namespace

// ---- PrunePlugin

PrunePlugin::PrunePlugin(const Attributes& attributes) noexcept : attributes_(attributes), description_{} {
    const Attributes& a = attributes_;
    std::snprintf(
        description_.data(), description_.size(),
        "%s num_prefix_tokens=%d selection=%s reduction=%s capacity=%d multiple_of=%d opt_tokens=%d max_tokens=%d",
        SIMPRUNE_VERSION, a.num_prefix_tokens, kSelections[a.selection], kReductions[a.reduction], a.capacity,
        a.multiple_of, a.opt_tokens, a.max_tokens);
    for (int i = 0; i < kNumFields; ++i) {
        const Field& field = kFields[i];
        const int32_t& value = attributes_.*field.value;
        if (field.choices != nullptr) {
            const char* text = field.choices[value];
            const auto length = static_cast<int32_t>(std::strlen(text));
            fields_[i] = PluginField(field.name, text, PluginFieldType::kCHAR, length);
        } else {
            fields_[i] = PluginField(field.name, &value, PluginFieldType::kINT32, 1);
        }
    }
    field_collection_.nbFields = kNumFields;
    field_collection_.fields = fields_.data();
}

// IPluginV3

nvinfer1::IPluginCapability* PrunePlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    log_error("capability %d is not known to this plugin", static_cast<int>(type));
    return nullptr;
}

nvinfer1::IPluginV3* PrunePlugin::clone() noexcept {
    auto* copy = new (std::nothrow) PrunePlugin(attributes_);
    if (copy == nullptr) log_error("no memory for a copy of the plugin");
    return copy;
}

// IPluginV3OneCore

const char* PrunePlugin::getPluginName() const noexcept {
    return kName;
}

const char* PrunePlugin::getPluginVersion() const noexcept {
    return kVersion;
}

const char* PrunePlugin::getPluginNamespace() const noexcept {
    return kNamespace;
}

// IPluginV3OneBuild

int32_t PrunePlugin::getNbOutputs() const noexcept {
    return attributes_.capacity > 0 ? kNumKept : kNumKept + 1;
}

int32_t PrunePlugin::getOutputDataTypes(
    DataType* output_types, int32_t num_outputs, const DataType* input_types, int32_t num_inputs) const noexcept {
    if (!takes_counts(num_inputs, num_outputs)) return kFailed;
    if (!takes_types({input_types[kTokens], input_types[kFeatures], input_types[kLogSize], input_types[kThreshold]})) {
        return kFailed;
    }
    output_types[kKeptTokens] = input_types[kTokens];
    output_types[kKeptLogSize] = DataType::kFLOAT;
    output_types[kKeptIndex] = DataType::kINT64;
    output_types[kAssignment] = DataType::kINT64;
    // The only type that TensorRT's headers allow for a size tensor
    if (num_outputs > kNumKept) output_types[kNumKept] = DataType::kINT32;
    return kOk;
}

int32_t PrunePlugin::getOutputShapes(
    const DimsExprs* inputs, int32_t num_inputs, const DimsExprs*, int32_t, DimsExprs* outputs, int32_t num_outputs,
    nvinfer1::IExprBuilder& builder) noexcept {
    try {
        if (!takes_counts(num_inputs, num_outputs)) return kFailed;
        if (!takes_shapes(shapes_by([inputs](int i) -> const DimsExprs& { return inputs[i]; }))) return kFailed;
        const DimsExprs& tokens = inputs[kTokens];
        const IDimensionExpr *batch = tokens.d[0], *num_tokens = tokens.d[1], *dim = tokens.d[2];
        const IDimensionExpr* slots = nullptr;
        if (attributes_.capacity == 0) {
            slots = declare_slots(*num_tokens, builder);
        } else {
            slots = builder.constant(int64_t{attributes_.num_prefix_tokens} + attributes_.capacity);
            if (slots == nullptr) log_error("TensorRT made no expression for capacity %d", attributes_.capacity);
        }
        if (slots == nullptr) return kFailed;

        outputs[kKeptTokens].nbDims = 3;
        outputs[kKeptTokens].d[0] = batch;
        outputs[kKeptTokens].d[1] = slots;
        outputs[kKeptTokens].d[2] = dim;
        for (const Output output : {kKeptLogSize, kKeptIndex, kAssignment}) {
            outputs[output].nbDims = 2;
            outputs[output].d[0] = batch;
            outputs[output].d[1] = output == kAssignment ? num_tokens : slots;
        }
        if (num_outputs > kNumKept) outputs[kNumKept].nbDims = 0;
        return kOk;
    } catch (...) {
        log_error("TensorRT's shape expressions threw an exception");
        return kFailed;
    }
}

// K is in a tensor. TensorRT wants to know its bound, and a value to tune for that depends on no
// other size tensor: behind another prune layer the attributes must say both.
const IDimensionExpr* PrunePlugin::declare_slots(
    const IDimensionExpr& num_tokens, nvinfer1::IExprBuilder& builder) const {
    const int64_t opt = attributes_.opt_tokens, max = attributes_.max_tokens;
    if (num_tokens.isSizeTensor() && (opt == 0 || max == 0)) {
        log_error(
            "opt_tokens %lld and max_tokens %lld of a layer whose token count is the result of another prune layer: "
            "give both, the usual number of tokens and the largest, for which that before the first prune layer will "
            "do",
            number(opt), number(max));
        return nullptr;
    }
    const bool bounded = max > 0 && !num_tokens.isConstant();
    const IDimensionExpr* upper = bounded ? builder.constant(max) : &num_tokens;
    const IDimensionExpr* usual = upper == nullptr ? nullptr : usual_slots(num_tokens, *upper, builder);
    if (upper == nullptr || usual == nullptr) {
        log_error("TensorRT made no expression for opt_tokens %lld and max_tokens %lld", number(opt), number(max));
        return nullptr;
    }
    const IDimensionExpr* slots = builder.declareSizeTensor(kNumKept, *usual, *upper);
    if (slots == nullptr) log_error("TensorRT declared no size tensor for output %d", kNumKept);
    return slots;
}

// Where opt_tokens does not say what is usual: midway between the fewest and the most that can stay,
// which is three quarters of the patches with pairs, which keeps one of two, and half of them with
// redundancy, which may keep a single one.
const IDimensionExpr* PrunePlugin::usual_slots(
    const IDimensionExpr& num_tokens, const IDimensionExpr& upper, nvinfer1::IExprBuilder& builder) const {
    const int64_t opt = attributes_.opt_tokens, prefix = attributes_.num_prefix_tokens;
    // TensorRT should tune for a number that can come out
    const auto rounded = [step = int64_t{attributes_.multiple_of}](int64_t slots) {
        return (slots + step - 1) / step * step;
    };
    if (opt > 0 && upper.isConstant()) return builder.constant(std::min(rounded(opt), upper.getConstantValue()));
    if (opt > 0) {
        const IDimensionExpr* given = builder.constant(rounded(opt));
        return given == nullptr ? nullptr : builder.operation(DimensionOperation::kMIN, *given, upper);
    }
    const int64_t share = attributes_.selection == SIMPRUNE_PAIRS ? 4 : 2;
    if (num_tokens.isConstant()) {
        const int64_t all = num_tokens.getConstantValue();
        return builder.constant(std::min(rounded(all - (all - prefix) / share), all));
    }
    const IDimensionExpr *prefixes = builder.constant(prefix), *shares = builder.constant(share);
    if (prefixes == nullptr || shares == nullptr) return nullptr;
    const IDimensionExpr* gone = builder.operation(DimensionOperation::kSUB, num_tokens, *prefixes);
    if (gone != nullptr) gone = builder.operation(DimensionOperation::kFLOOR_DIV, *gone, *shares);
    return gone == nullptr ? nullptr : builder.operation(DimensionOperation::kSUB, num_tokens, *gone);
}

bool PrunePlugin::supportsFormatCombination(
    int32_t position, const DynamicPluginTensorDesc* in_out, int32_t num_inputs, int32_t num_outputs) noexcept {
    if (!takes_counts(num_inputs, num_outputs)) return false;
    if (position < 0 || position >= num_inputs + num_outputs) return false;
    const PluginTensorDesc& desc = in_out[position].desc;
    if (desc.format != TensorFormat::kLINEAR) return false;
    switch (position) {
        case kTokens:
            return dtype_of(desc.type) >= 0;
        case kFeatures:
        case kNumInputs + kKeptTokens:
            return desc.type == in_out[kTokens].desc.type;
        case kNumInputs + kKeptIndex:
        case kNumInputs + kAssignment:
            return desc.type == DataType::kINT64;
        case kNumInputs + kNumKept:
            return desc.type == DataType::kINT32;
        default:
            return desc.type == DataType::kFLOAT;
    }
}

int32_t PrunePlugin::configurePlugin(
    const DynamicPluginTensorDesc* in, int32_t num_inputs, const DynamicPluginTensorDesc*,
    int32_t num_outputs) noexcept {
    if (!takes_counts(num_inputs, num_outputs)) return kFailed;
    if (!takes_types(types_of(in))) return kFailed;
    return takes_shapes(network_shapes(in)) && takes_shapes(largest_shapes(in)) ? kOk : kFailed;
}

size_t PrunePlugin::getWorkspaceSize(
    const DynamicPluginTensorDesc* inputs, int32_t num_inputs, const DynamicPluginTensorDesc*,
    int32_t num_outputs) const noexcept {
    if (!takes_counts(num_inputs, num_outputs)) return 0;
    if (!takes_types(types_of(inputs))) return 0;
    const Shapes shapes = largest_shapes(inputs);
    if (!takes_whole_shapes(shapes)) return 0;
    const simprune_problem largest = problem(shapes, inputs[kTokens].desc.type);
    const size_t bytes = simprune_workspace_bytes(&largest);
    if (bytes == 0) log_error("%s", simprune_error());
    // TensorRT promises no alignment
    return bytes == 0 ? 0 : bytes + kWorkspaceAlignment;
}

// Shapes and types are added by TensorRT
const char* PrunePlugin::getTimingCacheID() noexcept {
    return description_.data();
}

const char* PrunePlugin::getMetadataString() noexcept {
    return description_.data();
}

// IPluginV3OneRuntime

int32_t PrunePlugin::onShapeChange(
    const PluginTensorDesc* in, int32_t num_inputs, const PluginTensorDesc*, int32_t num_outputs) noexcept {
    if (!takes_counts(num_inputs, num_outputs)) return kFailed;
    if (!takes_types(types_of(in))) return kFailed;
    // The token count behind another prune layer may not be known yet
    return takes_shapes(shapes_of(in)) ? kOk : kFailed;
}

int32_t PrunePlugin::enqueue(
    const PluginTensorDesc* input_descs, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
    void* workspace, cudaStream_t stream) noexcept {
    if (input_descs == nullptr || inputs == nullptr || outputs == nullptr) {
        log_error("enqueue was called without descriptions or addresses of its tensors");
        return kFailed;
    }
    if (!takes_types(types_of(input_descs))) return kFailed;
    const Shapes shapes = shapes_of(input_descs);
    if (!takes_whole_shapes(shapes)) return kFailed;

    simprune_buffers buffers{};
    buffers.tokens = inputs[kTokens];
    buffers.features = inputs[kFeatures];
    buffers.log_size = static_cast<const float*>(inputs[kLogSize]);
    buffers.threshold = static_cast<const float*>(inputs[kThreshold]);
    buffers.kept_tokens = outputs[kKeptTokens];
    buffers.kept_log_size = static_cast<float*>(outputs[kKeptLogSize]);
    buffers.kept_index = static_cast<int64_t*>(outputs[kKeptIndex]);
    buffers.assignment = static_cast<int64_t*>(outputs[kAssignment]);
    if (attributes_.capacity == 0) {
        // The C interface does without it, TensorRT does not
        if (outputs[kNumKept] == nullptr) {
            log_error("enqueue was called without an address for the size tensor");
            return kFailed;
        }
        buffers.num_kept = static_cast<int32_t*>(outputs[kNumKept]);
    }
    const simprune_problem call = problem(shapes, input_descs[kTokens].type);
    // TensorRT does not say how much it gives, but it asked for the largest shapes
    if (workspace != nullptr) workspace = aligned(workspace);
    if (simprune_enqueue(&call, &buffers, workspace, simprune_workspace_bytes(&call), stream) != SIMPRUNE_OK) {
        log_error("%s", simprune_error());
        return kFailed;
    }
    return kOk;
}

nvinfer1::IPluginV3* PrunePlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    return clone();
}

const PluginFieldCollection* PrunePlugin::getFieldsToSerialize() noexcept {
    return &field_collection_;
}

// What the plugin takes

bool PrunePlugin::takes_counts(int32_t num_inputs, int32_t num_outputs) const noexcept {
    if (num_inputs != kNumInputs) {
        log_error(
            "%d inputs: the plugin has 4, tokens, features, log_size and threshold%s%s", num_inputs,
            num_inputs == kFormerInputs ? "; " : "", num_inputs == kFormerInputs ? kExportAgain : "");
        return false;
    }
    if (num_outputs != getNbOutputs()) {
        log_error(
            "%d outputs: with capacity %d the plugin has %d, kept_tokens, kept_log_size, kept_index, assignment%s",
            num_outputs, attributes_.capacity, getNbOutputs(), attributes_.capacity > 0 ? "" : " and the size tensor");
        return false;
    }
    return true;
}

bool PrunePlugin::takes_types(const Types& types) const noexcept {
    if (dtype_of(types[kTokens]) < 0) {
        log_error("tokens are %s: give float32, float16 or bfloat16", name_of(types[kTokens]));
        return false;
    }
    if (types[kFeatures] != types[kTokens]) {
        log_error(
            "features are %s and tokens %s: they must be of one type, so put a Cast before the features",
            name_of(types[kFeatures]), name_of(types[kTokens]));
        return false;
    }
    for (const Input input : {kLogSize, kThreshold}) {
        if (types[input] == DataType::kFLOAT) continue;
        log_error(
            "%s is %s: it must be float32 whatever the tokens are, so put a Cast before it",
            input == kLogSize ? "log_size" : "threshold", name_of(types[input]));
        return false;
    }
    return true;
}

// Sizes that are not known are taken.
bool PrunePlugin::takes_shapes(const Shapes& shapes) const noexcept {
    const Shape &tokens = shapes[kTokens], &features = shapes[kFeatures], &log_size = shapes[kLogSize],
                &threshold = shapes[kThreshold];
    if (!has_rank("tokens", tokens, 3, "[images, tokens, width]")) return false;
    if (!has_rank("features", features, 3, "[images, tokens, width]")) return false;
    if (!has_rank("log_size", log_size, 2, "[images, tokens]")) return false;
    if (!has_rank("threshold", threshold, 1, "[1] or [images]")) return false;
    if (!same_counts("tokens", tokens, "features", features)) return false;
    if (!same_counts("tokens", tokens, "log_size", log_size)) return false;
    if (!same_counts("features", features, "log_size", log_size)) return false;
    if (tokens.d[2] == 0 || features.d[2] == 0) {
        log_error("%s have a width of 0: give at least 1", tokens.d[2] == 0 ? "tokens" : "features");
        return false;
    }
    const int64_t batch = any_known({tokens.d[0], features.d[0], log_size.d[0]});
    if (batch == 0) {
        log_error("the batch is 0: give at least one image");
        return false;
    }
    const int64_t thresholds = threshold.d[0];
    if (thresholds == 0 || (known(thresholds) && thresholds != 1 && disagree(thresholds, batch))) {
        log_error(
            "%lld thresholds for %lld images (-1: any number): give one, or one an image", number(thresholds),
            number(batch));
        return false;
    }
    const int64_t num_tokens = any_known({tokens.d[1], features.d[1], log_size.d[1]});
    return !known(num_tokens) || takes_token_count(num_tokens);
}

bool PrunePlugin::takes_token_count(int64_t num_tokens) const noexcept {
    const Attributes& a = attributes_;
    const int64_t patches = num_tokens - a.num_prefix_tokens;
    if (patches < 1) {
        log_error(
            "num_prefix_tokens %d leaves no patches among %lld tokens: give fewer prefix tokens, or leave this layer "
            "out",
            a.num_prefix_tokens, number(num_tokens));
        return false;
    }
    if (patches > SIMPRUNE_MAX_PATCHES) {
        log_error(
            "%lld patches are more than the %d that the plugin holds: use smaller images, or build the engine from "
            "the ONNX function without the plugin",
            number(patches), SIMPRUNE_MAX_PATCHES);
        return false;
    }
    if (a.capacity > patches) {
        log_error(
            "capacity %d is more than the %lld patches of %lld tokens: give a smaller capacity", a.capacity,
            number(patches), number(num_tokens));
        return false;
    }
    if (a.capacity > 0 && a.selection == SIMPRUNE_PAIRS && a.capacity < patches / 2) {
        log_error(
            "capacity %d is fewer than the %lld patches that selection \"pairs\" keeps of %lld: give %lld at least",
            a.capacity, number(patches / 2), number(patches), number(patches / 2));
        return false;
    }
    if (a.capacity == 0 && a.max_tokens > 0 && num_tokens > a.max_tokens) {
        log_error(
            "%lld tokens are more than max_tokens %d, for which the outputs have room: export with a larger max_tokens",
            number(num_tokens), a.max_tokens);
        return false;
    }
    return true;
}

bool PrunePlugin::takes_whole_shapes(const Shapes& shapes) const noexcept {
    if (!takes_shapes(shapes)) return false;
    const Shape &tokens = shapes[kTokens], &features = shapes[kFeatures], &threshold = shapes[kThreshold];
    const auto all_known = [](std::initializer_list<int64_t> sizes) {
        return std::all_of(sizes.begin(), sizes.end(), known);
    };
    if (all_known({tokens.d[0], tokens.d[1], tokens.d[2], features.d[2], threshold.d[0]})) return true;
    log_error(
        "tokens [%lld, %lld, %lld] with features of width %lld and %lld thresholds: a size is not known (-1) where all "
        "of them are needed",
        number(tokens.d[0]), number(tokens.d[1]), number(tokens.d[2]), number(features.d[2]), number(threshold.d[0]));
    return false;
}

simprune_problem PrunePlugin::problem(const Shapes& shapes, DataType type) const noexcept {
    simprune_problem problem{};
    problem.batch = shapes[kTokens].d[0];
    problem.num_tokens = shapes[kTokens].d[1];
    problem.dim = shapes[kTokens].d[2];
    problem.feature_dim = shapes[kFeatures].d[2];
    problem.num_thresholds = shapes[kThreshold].d[0];
    problem.capacity = attributes_.capacity;
    problem.multiple_of = attributes_.multiple_of;
    problem.num_prefix_tokens = attributes_.num_prefix_tokens;
    problem.dtype = dtype_of(type);
    problem.selection = attributes_.selection;
    problem.reduction = attributes_.reduction;
    return problem;
}

// ---- PruneCreator

PruneCreator::PruneCreator() noexcept {
    for (int i = 0; i < kNumFields; ++i) {
        const PluginFieldType type = kFields[i].choices != nullptr ? PluginFieldType::kCHAR : PluginFieldType::kINT32;
        fields_[i] = PluginField(kFields[i].name, nullptr, type, 1);
    }
    field_collection_.nbFields = kNumFields;
    field_collection_.fields = fields_.data();
}

nvinfer1::IPluginV3* PruneCreator::createPlugin(
    const char*, const PluginFieldCollection* fields, nvinfer1::TensorRTPhase) noexcept {
    // The runtime's fields are those of getFieldsToSerialize, so both phases read them alike
    Attributes attributes;
    if (!read_fields(fields, attributes)) return nullptr;
    auto* plugin = new (std::nothrow) PrunePlugin(attributes);
    if (plugin == nullptr) log_error("no memory for the plugin");
    return plugin;
}

const PluginFieldCollection* PruneCreator::getFieldNames() noexcept {
    return &field_collection_;
}

const char* PruneCreator::getPluginName() const noexcept {
    return kName;
}

const char* PruneCreator::getPluginVersion() const noexcept {
    return kVersion;
}

nvinfer1::IPluginV3* FormerCreator::createPlugin(
    const char*, const PluginFieldCollection*, nvinfer1::TensorRTPhase) noexcept {
    log_error("plugin_version is \"%s\": %s", kFormerVersion, kExportAgain);
    return nullptr;
}

const char* FormerCreator::getPluginVersion() const noexcept {
    return kFormerVersion;
}

const char* PruneCreator::getPluginNamespace() const noexcept {
    return kNamespace;
}

}  // namespace tensorrt
}  // namespace simprune
