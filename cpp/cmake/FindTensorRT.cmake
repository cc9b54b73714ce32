# FindTensorRT: the target tensorrt::tensorrt, of a release unpacked at TENSORRT_ROOT, or installed, with CUDA's runtime.
# With FASTDDIM_TENSORRT_RTX it is TensorRT for RTX.
if(FASTDDIM_TENSORRT_RTX)
  set(TensorRT_NAMES tensorrt_rtx)
else()
  set(TensorRT_NAMES nvinfer)
endif()
find_path(TensorRT_INCLUDE_DIR NvInfer.h HINTS ${TENSORRT_ROOT} ENV TENSORRT_ROOT PATH_SUFFIXES include)
find_library(TensorRT_LIBRARY ${TensorRT_NAMES} HINTS ${TENSORRT_ROOT} ENV TENSORRT_ROOT PATH_SUFFIXES lib lib64)
set(TensorRT_CUDA_HINTS ${CUDAToolkit_ROOT} ENV CUDAToolkit_ROOT ENV CUDA_PATH /usr/local/cuda)
find_path(TensorRT_CUDA_INCLUDE_DIR cuda_runtime_api.h HINTS ${TensorRT_CUDA_HINTS} PATH_SUFFIXES include)
find_library(TensorRT_CUDART_LIBRARY cudart HINTS ${TensorRT_CUDA_HINTS} PATH_SUFFIXES lib64 lib lib/x86_64-linux-gnu)
mark_as_advanced(TensorRT_INCLUDE_DIR TensorRT_LIBRARY TensorRT_CUDA_INCLUDE_DIR TensorRT_CUDART_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TensorRT
  REQUIRED_VARS TensorRT_LIBRARY TensorRT_INCLUDE_DIR TensorRT_CUDART_LIBRARY TensorRT_CUDA_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "pass -DTENSORRT_ROOT=FOLDER, a release with include/ and lib/, and -DCUDAToolkit_ROOT=FOLDER")

if(TensorRT_FOUND AND NOT TARGET tensorrt::tensorrt)
  add_library(tensorrt::cudart UNKNOWN IMPORTED)
  set_target_properties(tensorrt::cudart PROPERTIES IMPORTED_LOCATION "${TensorRT_CUDART_LIBRARY}"
                                                    INTERFACE_INCLUDE_DIRECTORIES "${TensorRT_CUDA_INCLUDE_DIR}")
  add_library(tensorrt::tensorrt UNKNOWN IMPORTED)
  set_target_properties(tensorrt::tensorrt PROPERTIES IMPORTED_LOCATION "${TensorRT_LIBRARY}"
                                                      INTERFACE_INCLUDE_DIRECTORIES "${TensorRT_INCLUDE_DIR}"
                                                      INTERFACE_LINK_LIBRARIES tensorrt::cudart)
endif()
