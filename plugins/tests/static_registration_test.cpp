// The static library registers its creators when the program starts, and logs to TensorRT's logger.
#include "check.h"
#include "plugin_library.h"

// The mock derives from interfaces that TensorRT 10 deprecates, and one of its functions is not in
// every version, so that it cannot say `override`
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#if defined(__clang__)
#pragma clang diagnostic ignored "-Winconsistent-missing-override"
#endif

namespace {

using nvinfer1::IPluginCreatorInterface;

struct Registration {
    IPluginCreatorInterface* creator;
    std::string name_space;
};

// In a function, because registrations come before the globals of this file are made
std::vector<Registration>& registrations() {
    static std::vector<Registration> all;
    return all;
}

class Registry : public nvinfer1::IPluginRegistry {
public:
    bool registerCreator(IPluginCreatorInterface& creator, const char* const name_space) noexcept override {
        registrations().push_back({&creator, name_space});
        return true;
    }
    void setErrorRecorder(nvinfer1::IErrorRecorder* const) noexcept override {}
    nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool const) override {}
    PluginLibraryHandle loadLibrary(const char*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    IPluginCreatorInterface* const* getAllCreators(int32_t* const) const noexcept override { return nullptr; }
    virtual IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept { return nullptr; }
    IPluginCreatorInterface* getCreator(const char* const, const char* const, const char* const) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(const IPluginCreatorInterface&) noexcept override { return false; }
    nvinfer1::IPluginResource* acquirePluginResource(const char*, nvinfer1::IPluginResource*) noexcept override {
        return nullptr;
    }
    int32_t releasePluginResource(const char*) noexcept override { return 0; }
#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(nvinfer1::IPluginCreator&, const char* const) noexcept override {
        return false;
    }
    nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override {
        return nullptr;
    }
    nvinfer1::IPluginCreator* getPluginCreator(
        const char* const, const char* const, const char* const) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(const nvinfer1::IPluginCreator&) noexcept override {
        return false;
    }
#endif
};

class Logger final : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        loggers::messages.push_back({static_cast<int>(severity), message});
    }
};

}  // namespace

// What the application's TensorRT library defines
extern "C" nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
    static Registry registry;
    return &registry;
}

extern "C" nvinfer1::ILogger* getLogger() noexcept {
    static Logger logger;
    return &logger;
}

int main() {
    if (!CHECK_EQUAL(registrations().size(), 2u)) return check::result();
    std::vector<nvinfer1::IPluginCreatorV3One*> creators;
    for (const Registration& one : registrations()) {
        CHECK_EQUAL(one.name_space, "");
        CHECK_EQUAL(std::string(one.creator->getInterfaceInfo().kind), "PLUGIN CREATOR_V3ONE");
        creators.push_back(static_cast<nvinfer1::IPluginCreatorV3One*>(one.creator));
        CHECK_EQUAL(std::string(creators.back()->getPluginName()), "SimilarityPrune");
    }
    CHECK_EQUAL(std::string(creators[0]->getPluginVersion()), "2");
    CHECK_EQUAL(std::string(creators[1]->getPluginVersion()), "1");
    nvinfer1::IPluginCreatorV3One& creator = *creators[0];

    using plugin_library::Fields;
    const Fields good = Fields().add("num_prefix_tokens", 1), bad = Fields().add("num_prefix_tokens", -3);
    nvinfer1::PluginFieldCollection fields = good.collection();
    const plugin_library::PluginPointer plugin(creator.createPlugin("layer", &fields, nvinfer1::TensorRTPhase::kBUILD));
    CHECK(plugin != nullptr);
    CHECK_EQUAL(plugin_library::logged(), "");
    fields = bad.collection();
    CHECK(creator.createPlugin("layer", &fields, nvinfer1::TensorRTPhase::kBUILD) == nullptr);
    CHECK_EQUAL(loggers::messages.size(), 1u);
    CHECK_CONTAINS(plugin_library::logged(), "num_prefix_tokens -3 is outside");

    // What files and engines from before version 2 ask for is refused, whatever its fields say
    for (const nvinfer1::TensorRTPhase phase : {nvinfer1::TensorRTPhase::kBUILD, nvinfer1::TensorRTPhase::kRUNTIME}) {
        fields = good.collection();
        for (const nvinfer1::PluginFieldCollection* given :
             {&fields, static_cast<nvinfer1::PluginFieldCollection*>(nullptr)}) {
            CHECK(creators[1]->createPlugin("layer", given, phase) == nullptr);
            CHECK_EQUAL(
                plugin_library::logged(),
                "SimilarityPrune: plugin_version is \"1\": the file is from before version 2 of this operator: export "
                "the model and build its engine again\n");
        }
    }
    return check::result();
}
