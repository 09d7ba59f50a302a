#!/usr/bin/env bash
# The study of docs/study.md, by commands: bash docs/study.sh CORPUS HOME
# CORPUS holds flickr8k_224/0000{0,1}.tar and coco_original/00000.tar as img2dataset leaves them, HOME becomes the state
# folder. The same again goes on where it stopped. Figures and pictures gather in HOME/figures.
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
corpus=$(realpath "$1")
export GLIDEPATH_HOME=$(realpath -m "$2")
mkdir -p "$GLIDEPATH_HOME/figures" "$GLIDEPATH_HOME/split"
cd "$GLIDEPATH_HOME"

# 1. Four disjoint shares of the photographs, by their keys in the second tar. share NAME PATTERN...: a tar of its own.
share() {
    local folder; folder=$(mktemp -d)
    mkdir -p "split/$1"
    tar -xf "$corpus/flickr8k_224/00001.tar" -C "$folder" --wildcards "${@:2}"
    tar --sort=name --owner=0 --group=0 --mtime=@0 -cf "split/$1/00000.tar" -C "$folder" .
    rm -r "$folder"
}
share generator '0000100*' '0000101*' '0000102*' '0000103*'
share heldout '0000104*' '0000105*'
share rest '0000106*' '0000107*' '0000108*' '0000109*'
generator='[{kind: img2dataset, uri: split/generator}]'
heldout='[{kind: img2dataset, uri: split/heldout}]'
clip="[{kind: img2dataset, uri: split/rest}, {kind: img2dataset, uri: $corpus/flickr8k_224/00000.tar},
    {kind: img2dataset, uri: $corpus/coco_original}]"
glidepath corpus build photos inputs="$generator" captions=all output=datasets/generator --json > figures/corpus-generator.json
glidepath corpus build photos inputs="$generator" output=datasets/generator-captions --json > figures/corpus-generator-captions.json
glidepath corpus build photos inputs="$heldout" output=datasets/heldout --json > figures/corpus-heldout.json
glidepath corpus build photos inputs="$clip" captions=all output=datasets/clip \
    decontaminate.sets='[datasets/generator, datasets/heldout]' --json > figures/corpus-clip.json

# 2. Ray, MLflow and S3 on this machine, with one CPU more than a training takes: for the evaluations beside it.
glidepath up --cpus 3
source stack/env

# 3. The noised CLIP that scores, of pictures that the generator never sees. 16 px, as all of it; both towers are trained.
glidepath train small-noised-clip dataset=clip images=57344 model.image_size=16 model.patch_size=4 \
    model.{embedding=64,image_layers=2,image_heads=4,image_init=clip,text_layers=1,text_heads=2} \
    lock_image=false logit_normal=null lr=1e-3 dropout=0.2 weight_decay=0.2 logit_scale=20 \
    heldout='{dataset: heldout, images: 200, every_images: 8192}'
python "$project/benchmarks/study.py" photographs --clip runs/small-noised-clip generator-captions heldout > figures/photographs.json

# 4. The base model; meanwhile, again and again, the figures of its newest checkpoint on held-out captions.
common=(dataset=generator model.image_size=16 model.attention_resolutions='[8, 4]' diffusion.prediction=v batch=16
    heldout='{dataset: heldout, images: 200, every_images: 8192}'
    samples="{every_images: 8192, prompts: ['A brown dog in running on grass .', 'A child painting a picture .',
        'A person in a red jacket snowboarding .', 'A man falling over in an ocean wave',
        'A bundled up toddler is walking over snow .', 'A girl in a black and blue wetsuit is surfing .',
        'A black dog bounds through a path in the snow .', 'A boy on a green plastic swing .'],
        sampling: {guidance_scale: 1.0, spacing: '20', sampler: dpm++}}")
glidepath submit train small-base images=49152 checkpoint.every_images=8192 launcher.standby=false "${common[@]}" & training=$!
evaluations=0
until glidepath checkpoints list small-base 2> /dev/null | grep -q images-; do sleep 5; done
while kill -0 "$training" 2> /dev/null; do
    evaluations=$((evaluations + 1))
    glidepath submit evaluate small dataset=heldout images=100 heldout.images=200 --json > figures/newest-$evaluations.json
    sleep 60
done
wait "$training"

# 5. From its last checkpoint, two runs of equal length: the classifier-free fine-tune, and the same without it.
glidepath train small-base-classifier-free images=4096 parent=small-base "${common[@]}"
glidepath train small-base run=small-base-longer images=4096 parent=small-base "${common[@]}"

# 6. Both, and what guidance does to the one that can be guided: on the generator's own captions, and on held-out ones.
glidepath evaluate small checkpoint=small-base-longer dataset=generator-captions --json > figures/without-generator-captions-200.json
glidepath evaluate small checkpoint=small-base-classifier-free dataset=generator-captions images=100 \
    sweep='{guidance_scale: [1.0, 2.0, 3.0, 5.0]}' --json > figures/with-generator-captions.json
glidepath evaluate small checkpoint=small-base-longer dataset=generator-captions images=100 --json > figures/without-generator-captions.json
glidepath evaluate small checkpoint=small-base-longer dataset=heldout images=100 --json > figures/without-heldout.json
glidepath evaluate small checkpoint=small-base-classifier-free dataset=heldout images=100 sampling.guidance_scale=3.0 \
    --json > figures/with-heldout.json
cp "$(sed -n 's/.*"curves": "\([^"]*\)".*/\1/p' figures/with-generator-captions.json)" figures/guidance.png
glidepath runs compare small-base-classifier-free small-base-longer \
    --html compare.html --png compare.png --json > figures/compare.json

# 7. Fifty captions drawn by both, judged on the judging page by a program.
tar -xf split/generator/00000.tar --wildcards './0000100[0-4]*.txt' --to-command='cat; echo' > prompts.txt
drawn=(--prompts prompts.txt --spacing 20 --sampler dpm++)
glidepath sample small-base-longer "${drawn[@]}" --guidance 1 --out samples/without
glidepath sample small-base-classifier-free "${drawn[@]}" --guidance 1 --out samples/with
glidepath sample small-base-classifier-free "${drawn[@]}" --guidance 3 --out samples/with-guided
glidepath judge new study --question caption \
    --model without=samples/without --model with=samples/with --model with-guided=samples/with-guided
rm -f page.json
glidepath page --study study --checkpoint small-base-classifier-free --port 0 --json > page.json & page=$!
until [ -s page.json ]; do sleep 1; done
python "$project/benchmarks/study.py" judge page.json --clip runs/small-noised-clip
python "$project/benchmarks/study.py" pages page.json --compared compare.html --out figures
kill "$page"
wait "$page"
glidepath judge results study --out judged --json > figures/judged.json
cp judged/elo.png figures/

python "$project/benchmarks/study.py" keep .
glidepath down
