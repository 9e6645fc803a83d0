from .config.loading import load_config as load_config
from .config.schema import RunConfig as RunConfig
from .data.dataset import GeoDataset as GeoDataset
from .data.dataset import open_dataset as open_dataset
from .data.dataset import write_dataset as write_dataset
from .data.pairs import PairTable as PairTable
from .data.tables.batch_plan import BatchPlan as BatchPlan
from .data.tables.neighbor_graph import NeighborGraph as NeighborGraph
from .evaluation.metrics import retrieval_metrics as retrieval_metrics
from .index.sharded.client import IndexClient as IndexClient
from .index.sharded.service import IndexService as IndexService
from .index.vector_index import VectorIndex as VectorIndex
from .pipeline.driver import run as run
from .pipeline.run_folder import RunResult as RunResult
from .sampling.geographic_neighbors import geographic_neighbors as geographic_neighbors
from .sampling.sampler import plan_batches as plan_batches
from .training.loss import symmetric_info_nce as symmetric_info_nce

__version__: str
