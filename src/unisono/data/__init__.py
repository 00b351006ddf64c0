"""Text and chats become numbered blocks of tokens, in an order that depends on nothing but the seed.

sources -> documents -> token ids -> parts -> packed blocks on disk -> order -> batches, and a ledger
of what each step used. `prepare` does the first half once; `Blocks`, `Order` and `Ledger` are what a
training loop needs. Importing this package imports numpy, and neither torch nor transformers.
"""

from unisono.data.blocks import Batch as Batch
from unisono.data.blocks import Blocks as Blocks
from unisono.data.ledger import Ledger as Ledger
from unisono.data.order import Order as Order
from unisono.data.prepare import Prepared as Prepared
from unisono.data.prepare import prepare as prepare
from unisono.data.tokenizer import check_vocabulary as check_vocabulary
from unisono.data.tokenizer import load_tokenizer as load_tokenizer
from unisono.data.tokenizer import tokenizer_digest as tokenizer_digest
