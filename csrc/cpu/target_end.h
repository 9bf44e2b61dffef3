// Ends what target_begin.h began.
#if defined(__clang__)
#pragma clang attribute pop
#endif
// GCC instantiates templates at the end of the file, under the options that hold there: its target is not popped.
