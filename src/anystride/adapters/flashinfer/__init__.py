"""FlashInfer's ``mla.BatchMLAPagedAttentionWrapper`` and ``BatchDecodeWithPagedKVCacheWrapper``.

    from anystride.adapters.flashinfer import BatchMLAPagedAttentionWrapper

``plan`` once a step turns the lists of pages into a block table on the device, and shares out the work. It
reads how long the lists are on the host, as the original does. ``run``, once a layer, reads nothing there.
"""

from anystride.adapters.flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper
from anystride.adapters.flashinfer.mla import BatchMLAPagedAttentionWrapper

__all__ = ["BatchDecodeWithPagedKVCacheWrapper", "BatchMLAPagedAttentionWrapper"]
