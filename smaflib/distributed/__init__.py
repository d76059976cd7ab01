"""One stage in several processes: torchrun starts them, torch.distributed joins them.

:mod:`~smaflib.distributed.launch` is the side of the process that waits, :mod:`~smaflib.distributed.worker` is what
torchrun starts, :mod:`~smaflib.distributed.ranks` what stages ask inside one.
"""
