// For programs that open a plugin library and ask nothing of it (Triton's TensorRT backend does):
// with SIMPRUNE_REGISTER set, the library hands its creators to TensorRT's registry itself as soon
// as it is opened. Without it nothing happens here, and TensorRT's own loader calls getCreators.
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "simprune.h"
#include "tensorrt_log.h"
#include "tensorrt_plugin.h"

extern "C" SIMPRUNE_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace simprune {
namespace tensorrt {
namespace {

bool is_named(const char* path, const char* beginning) {
    const char* slash = std::strrchr(path, '/');
    return std::strncmp(slash ? slash + 1 : path, beginning, std::strlen(beginning)) == 0;
}

// Full or lean TensorRT, never TensorRT-RTX (libtensorrt_rtx.so), whose networks take no plugins.
int note_tensorrt(dl_phdr_info* loaded, size_t, void* path) {
    const char* name = loaded->dlpi_name;
    if (!is_named(name, "libnvinfer.so") && !is_named(name, "libnvinfer_lean.so")) return 0;
    *static_cast<std::string*>(path) = name;
    return 1;
}

template <typename Function>
Function find(void* library, const char* name) {
    return reinterpret_cast<Function>(dlsym(library, name));
}

// The file that an object's class comes from
const char* library_of(const void* object) {
    Dl_info where{};
    const void* functions = *static_cast<const void* const*>(object);
    return dladdr(functions, &where) != 0 && where.dli_fname != nullptr ? where.dli_fname : "another library";
}

// Returns why it could not be done, or nothing.
std::string register_creators() {
    std::string path;
    dl_iterate_phdr(note_tensorrt, &path);
    if (path.empty()) return "no TensorRT is loaded in this process";
    void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return "TensorRT's library cannot be opened";
    auto version = find<int32_t (*)()>(library, "getInferLibVersion");
    auto get_registry = find<nvinfer1::IPluginRegistry* (*)()>(library, "getPluginRegistry");
    if (version == nullptr || get_registry == nullptr) return "TensorRT's library has no registry";
    // The registry's C++ interface is that of the headers only within a major version
    const int32_t major = version() / 10000;
    if (major != NV_TENSORRT_MAJOR) {
        char text[160];
        std::snprintf(
            text, sizeof text,
            "it was compiled with the headers of TensorRT %d, and this is %d: build it with this version's",
            NV_TENSORRT_MAJOR, major);
        return text;
    }
    auto* registry = get_registry();
    if (registry == nullptr) return "TensorRT has no registry";
    if (auto get_logger = find<nvinfer1::ILogger* (*)() noexcept>(library, "getLogger")) {
        set_logger_source(get_logger);
    }
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i) {
        const auto& creator = static_cast<nvinfer1::IPluginCreatorV3One&>(*creators[i]);
        const char *name = creator.getPluginName(), *plugin_version = creator.getPluginVersion();
        const auto* there = registry->getCreator(name, plugin_version, creator.getPluginNamespace());
        if (there != nullptr) {
            return std::string("TensorRT has ") + name + " " + plugin_version + " of " + library_of(there) +
                   " already, which it goes on with: load one library alone";
        }
        if (!registry->registerCreator(*creators[i], "")) return "TensorRT did not take it";
    }
    // Unless there is a library of that version
    static FormerCreator former;
    if (registry->getCreator(former.getPluginName(), former.getPluginVersion(), "") == nullptr) {
        registry->registerCreator(former, "");
    }
    // The registry points into this library from now on: it must outlive a dlclose
    Dl_info self;
    if (dladdr(reinterpret_cast<void*>(&getCreators), &self) != 0) {
        dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
    }
    return "";
}

struct RegistersItself {
    RegistersItself() {
        const char* wish = std::getenv("SIMPRUNE_REGISTER");
        if (wish == nullptr || *wish == '\0' || std::strcmp(wish, "0") == 0) return;
        const std::string problem = register_creators();
        if (!problem.empty()) std::fprintf(stderr, "simprune: the plugin was not registered: %s\n", problem.c_str());
    }
};

RegistersItself registers_itself;

}  // namespace
}  // namespace tensorrt
}  // namespace simprune
