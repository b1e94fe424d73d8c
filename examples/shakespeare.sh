#!/usr/bin/env bash
# A character model of Shakespeare within nanoGPT's CPU budget: 2,000 x 12 x 64 tokens and 0.82 M parameters.
# nanoGPT's README reports a validation loss of 1.88 for it.
#
#   examples/shakespeare.sh input.txt out [seed]
#
# input.txt is the 1.1 MB file of karpathy/char-rnn (data/tinyshakespeare/input.txt). The first 90 % are trained on,
# the last 10 % are judged: the mean loss per character over windows of 64 of all of it.
set -euo pipefail
input=$1 out=$2 seed=${3:-0}
mkdir -p "$out"
n=$(wc -c < "$input")
head -c $((n * 9 / 10)) "$input" > "$out/train.txt"
tail -c +$((n * 9 / 10 + 1)) "$input" > "$out/val.txt"
[ -d "$out/tokenizer" ] || llama2 train-tokenizer "$input" --type char --vocab-size 400 --out "$out/tokenizer"
llama2 prepare "$out/train.txt" --verbatim --tokenizer "$out/tokenizer" --out "$out/shards"
llama2 prepare "$out/val.txt" --verbatim --tokenizer "$out/tokenizer" --out "$out/val"
llama2 pretrain --config "$(dirname "$0")/shakespeare.toml" --data "$out/shards" --eval-data "$out/val" \
  --seed "$seed" --out "$out/run-$seed"
