//! What differs between the models of the Llama family, as data: one row per architecture, one weight map per format.
//!
//! A weight map names, for each fused matrix of the decoder, the checkpoint's tensors it is made of, how it is cut
//! across ranks ([`Shard`]) and how its parts are joined ([`Fuse`]). Order of work: shard each part, then fuse, then
//! repack for the device.

/// One supported architecture.
#[derive(Debug, PartialEq, Eq)]
pub struct Architecture {
    /// Name in messages.
    pub name: &'static str,
    /// Class in the `architectures` list of a Hugging Face `config.json`.
    pub hf_class: &'static str,
    /// `general.architecture` in GGUF.
    pub gguf_name: &'static str,
    /// q, k and v always have a bias.
    pub qkv_bias: bool,
    /// q and k of each head are RMS-normed before RoPE.
    pub qk_norm: bool,
    /// GGUF stores the rows of q and k permuted for interleaved RoPE.
    pub gguf_permuted: bool,
}

/// Every architecture this runtime serves.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "llama",
        hf_class: "LlamaForCausalLM",
        gguf_name: "llama",
        qkv_bias: false,
        qk_norm: false,
        gguf_permuted: true,
    },
    Architecture {
        name: "mistral",
        hf_class: "MistralForCausalLM",
        gguf_name: "llama",
        qkv_bias: false,
        qk_norm: false,
        gguf_permuted: true,
    },
    Architecture {
        name: "qwen2",
        hf_class: "Qwen2ForCausalLM",
        gguf_name: "qwen2",
        qkv_bias: true,
        qk_norm: false,
        gguf_permuted: false,
    },
    Architecture {
        name: "qwen3",
        hf_class: "Qwen3ForCausalLM",
        gguf_name: "qwen3",
        qkv_bias: false,
        qk_norm: true,
        gguf_permuted: false,
    },
];

impl Architecture {
    /// The row for one of `architectures` in a `config.json`.
    #[must_use]
    pub fn from_hf(class: &str) -> Option<&'static Self> {
        ARCHITECTURES
            .iter()
            .find(|architecture| architecture.hf_class == class)
    }

    /// The row for a `general.architecture`.
    #[must_use]
    pub fn from_gguf(name: &str) -> Option<&'static Self> {
        ARCHITECTURES
            .iter()
            .find(|architecture| architecture.gguf_name == name)
    }

    /// Names for error messages: what would have been accepted.
    #[must_use]
    pub fn supported() -> String {
        ARCHITECTURES
            .iter()
            .map(|architecture| architecture.name)
            .collect::<Vec<_>>()
            .join(", ")
    }
}

/// How a matrix `[out, in]` is cut across tensor-parallel ranks. One rank holds everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shard {
    /// By output rows.
    Column,
    /// By input columns; the partial results are summed across ranks.
    Row,
    /// By vocabulary rows, padded to a multiple of the ranks.
    Vocab,
    /// q by heads, k and v by KV group, padded with zero groups where they do not divide.
    KvGroup,
    /// Whole on every rank.
    Replicate,
}

/// How the parts of an entry become one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fuse {
    /// One part.
    Single,
    /// Output rows stacked in the order of the parts.
    StackRows,
}

/// One part of an entry: a tensor's name without `.weight` or `.bias`; `{}` is the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The name.
    pub name: &'static str,
    /// What it holds: decides its number of rows and its un-permutation.
    pub role: Role,
}

/// What a part holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `[num_heads · head_dim, hidden]`
    Query,
    /// `[num_kv_heads · head_dim, hidden]`, rotated
    Key,
    /// `[num_kv_heads · head_dim, hidden]`
    Value,
    /// `[hidden, num_heads · head_dim]`
    AttentionOutput,
    /// `[intermediate, hidden]`
    Gate,
    /// `[intermediate, hidden]`
    Up,
    /// `[hidden, intermediate]`
    Down,
    /// `[vocab, hidden]`
    Vocabulary,
}

/// A matrix of the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixEntry {
    /// Its parts.
    pub parts: &'static [Part],
    /// How they are cut.
    pub shard: Shard,
    /// How they are joined.
    pub fuse: Fuse,
}

/// Names of everything in one checkpoint format. Vectors are full names, matrices see [`Part`].
#[derive(Debug)]
#[allow(missing_docs)] // The fields are the decoder's own names.
pub struct WeightMap {
    pub embedding: MatrixEntry,
    pub input_norm: &'static str,
    pub qkv: MatrixEntry,
    pub query_norm: &'static str,
    pub key_norm: &'static str,
    pub attention_output: MatrixEntry,
    pub post_attention_norm: &'static str,
    pub gate_up: MatrixEntry,
    pub down: MatrixEntry,
    pub final_norm: &'static str,
    /// Absent from checkpoints with tied embeddings.
    pub head: MatrixEntry,
    /// Divisors of the rotary frequencies, `[rotary_dim / 2]`, where a format stores them.
    pub rope_factors: Option<&'static str>,
}

macro_rules! entry {
    ($shard:ident, $($name:literal => $role:ident),+) => {{
        const PARTS: &[Part] = &[$(Part { name: $name, role: Role::$role }),+];
        MatrixEntry {
            parts: PARTS,
            shard: Shard::$shard,
            fuse: if PARTS.len() == 1 { Fuse::Single } else { Fuse::StackRows },
        }
    }};
}

/// Names in Hugging Face checkpoints.
pub const HF_WEIGHTS: WeightMap = WeightMap {
    embedding: entry!(Vocab, "model.embed_tokens" => Vocabulary),
    input_norm: "model.layers.{}.input_layernorm.weight",
    qkv: entry!(KvGroup,
        "model.layers.{}.self_attn.q_proj" => Query,
        "model.layers.{}.self_attn.k_proj" => Key,
        "model.layers.{}.self_attn.v_proj" => Value),
    query_norm: "model.layers.{}.self_attn.q_norm.weight",
    key_norm: "model.layers.{}.self_attn.k_norm.weight",
    attention_output: entry!(Row, "model.layers.{}.self_attn.o_proj" => AttentionOutput),
    post_attention_norm: "model.layers.{}.post_attention_layernorm.weight",
    gate_up: entry!(Column, "model.layers.{}.mlp.gate_proj" => Gate, "model.layers.{}.mlp.up_proj" => Up),
    down: entry!(Row, "model.layers.{}.mlp.down_proj" => Down),
    final_norm: "model.norm.weight",
    head: entry!(Vocab, "lm_head" => Vocabulary),
    rope_factors: None,
};

/// Names in GGUF files.
pub const GGUF_WEIGHTS: WeightMap = WeightMap {
    embedding: entry!(Vocab, "token_embd" => Vocabulary),
    input_norm: "blk.{}.attn_norm.weight",
    qkv: entry!(KvGroup, "blk.{}.attn_q" => Query, "blk.{}.attn_k" => Key, "blk.{}.attn_v" => Value),
    query_norm: "blk.{}.attn_q_norm.weight",
    key_norm: "blk.{}.attn_k_norm.weight",
    attention_output: entry!(Row, "blk.{}.attn_output" => AttentionOutput),
    post_attention_norm: "blk.{}.ffn_norm.weight",
    gate_up: entry!(Column, "blk.{}.ffn_gate" => Gate, "blk.{}.ffn_up" => Up),
    down: entry!(Row, "blk.{}.ffn_down" => Down),
    final_norm: "output_norm.weight",
    head: entry!(Vocab, "output" => Vocabulary),
    rope_factors: Some("rope_freqs.weight"),
};
