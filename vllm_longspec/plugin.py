def register() -> None:
    import torch
    if not torch.cuda.is_available():
        from vllm_longspec.runtime.triton_cpu.kernels import register_cpu_kernels
        register_cpu_kernels()
