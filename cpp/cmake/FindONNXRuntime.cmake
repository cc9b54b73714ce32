# FindONNXRuntime: the target onnxruntime::onnxruntime, of a release unpacked at ONNXRUNTIME_ROOT, or installed.
find_path(ONNXRuntime_INCLUDE_DIR onnxruntime_cxx_api.h HINTS ${ONNXRUNTIME_ROOT} ENV ONNXRUNTIME_ROOT
          PATH_SUFFIXES include include/onnxruntime onnxruntime)
find_library(ONNXRuntime_LIBRARY onnxruntime HINTS ${ONNXRUNTIME_ROOT} ENV ONNXRUNTIME_ROOT PATH_SUFFIXES lib lib64)
mark_as_advanced(ONNXRuntime_INCLUDE_DIR ONNXRuntime_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  ONNXRuntime
  REQUIRED_VARS ONNXRuntime_LIBRARY ONNXRuntime_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "pass -DONNXRUNTIME_ROOT=FOLDER, a release of it with include/ and lib/")

if(ONNXRuntime_FOUND AND NOT TARGET onnxruntime::onnxruntime)
  add_library(onnxruntime::onnxruntime SHARED IMPORTED)
  set_target_properties(onnxruntime::onnxruntime PROPERTIES IMPORTED_LOCATION "${ONNXRuntime_LIBRARY}"
                                                            INTERFACE_INCLUDE_DIRECTORIES "${ONNXRuntime_INCLUDE_DIR}")
endif()
