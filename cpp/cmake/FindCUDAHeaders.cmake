# FindCUDAHeaders: the target CUDAHeaders::CUDAHeaders, with cuda.h of CUDA 12 or later; no library, as the driver is loaded
# at run time.
find_path(CUDAHeaders_INCLUDE_DIR cuda.h HINTS ${CUDA_INCLUDE_DIR} ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda
          PATH_SUFFIXES include)
mark_as_advanced(CUDAHeaders_INCLUDE_DIR)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(CUDAHeaders REQUIRED_VARS CUDAHeaders_INCLUDE_DIR
                                  REASON_FAILURE_MESSAGE "pass -DCUDA_INCLUDE_DIR=FOLDER, the one with cuda.h")

if(CUDAHeaders_FOUND AND NOT TARGET CUDAHeaders::CUDAHeaders)
  add_library(CUDAHeaders::CUDAHeaders INTERFACE IMPORTED)
  set_target_properties(CUDAHeaders::CUDAHeaders PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${CUDAHeaders_INCLUDE_DIR}")
endif()
