// What the library says of itself. The text also stands in the file, for those who cannot load it.
#include "simprune.h"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

namespace {

const char marked[] =
    "simprune-library-info:"
    "{\"kind\": \"" SIMPRUNE_KIND "\", \"version\": \"" SIMPRUNE_VERSION "\", \"abi\": " TEXT(SIMPRUNE_ABI_VERSION)
    ", \"operator\": \"SimilarityPrune\", \"operator_version\": \"2\", \"namespace\": \"\""
    ", \"cuda\": \"" SIMPRUNE_CUDA_VERSION "\", \"architectures\": \"" SIMPRUNE_ARCHITECTURES "\""
    ", \"tensorrt_headers\": \"" SIMPRUNE_TENSORRT_VERSION "\""
    ", \"fields\": {\"num_prefix_tokens\": \"int32\", \"selection\": \"string\", \"reduction\": \"string\""
    ", \"capacity\": \"int32\", \"multiple_of\": \"int32\", \"opt_tokens\": \"int32\", \"max_tokens\": \"int32\"}}";

constexpr unsigned kMark = sizeof("simprune-library-info:") - 1;

}  // namespace

const char* simprune_info(void) {
    return marked + kMark;
}
