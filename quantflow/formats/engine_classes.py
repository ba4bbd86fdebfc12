"""Which classes of a config.json's `architectures` engines have, of those that artifacts are
written for: read in the engines' own lists of models."""

from __future__ import annotations

from quantflow.formats.engines import LMDEPLOY, VLLM

_VLLM = """
    AXK1ForCausalLM AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM
    AriaForConditionalGeneration Blip2ForConditionalGeneration BloomForCausalLM
    Cohere2ForCausalLM Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration
    CohereCompassForConditionalGeneration CohereForCausalLM Cosmos3EdgeForConditionalGeneration
    CwmForCausalLM DbrxForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM
    DeepseekV3ForCausalLM DeepseekV4ForCausalLM DiffusionGemmaForBlockDiffusion
    Dots3NoteForCausalLM Emu3ForConditionalGeneration Ernie4_5ForCausalLM
    Ernie4_5_MoeForCausalLM Ernie4_5_VLMoeForConditionalGeneration Exaone4ForCausalLM
    Exaone4_5_ForConditionalGeneration ExaoneMoeForCausalLM FalconForCausalLM
    FalconH1ForCausalLM FalconMambaForCausalLM FlexOlmoForCausalLM GPT2LMHeadModel
    GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma3nForConditionalGeneration
    Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration
    GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
    Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration
    Glm5NextForConditionalGeneration GlmAsrForConditionalGeneration GlmForCausalLM
    GlmMoeDsaForCausalLM GlmOcrForConditionalGeneration GptOssForCausalLM
    Granite4VisionForConditionalGeneration GraniteForCausalLM GraniteMoeForCausalLM
    GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM
    GraniteSWAForCausalLM GraniteSpeechForConditionalGeneration
    GraniteSpeechPlusForConditionalGeneration HYV3ForCausalLM HYV4ForCausalLM HrmTextForCausalLM
    HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration
    HyperCLOVAXForCausalLM Idefics3ForConditionalGeneration InklingForCausalLM
    InklingForConditionalGeneration InternVLForConditionalGeneration Jais2ForCausalLM
    JambaForCausalLM KimiLinearForCausalLM LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM
    Lfm2VlForConditionalGeneration Llama4ForCausalLM Llama4ForConditionalGeneration
    LlamaForCausalLM LlavaForConditionalGeneration LlavaNextForConditionalGeneration
    LlavaNextVideoForConditionalGeneration LlavaOnevisionForConditionalGeneration
    LongcatFlashForCausalLM Mamba2ForCausalLM MambaForCausalLM MellumForCausalLM
    MiMoV2FlashForCausalLM MiniCPM3ForCausalLM MiniCPMV4_6ForConditionalGeneration
    MiniCPMV4_7ForConditionalGeneration MiniMaxM2ForCausalLM
    MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM
    Mistral3ForConditionalGeneration MistralForCausalLM MixtralForCausalLM
    Molmo2ForConditionalGeneration MossTranscribeDiarizeForConditionalGeneration
    MuseGlimmerForConditionalGeneration NemotronForCausalLM NemotronHForCausalLM
    NemotronH_Omni_Reasoning_V3 OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM
    OlmoHybridForCausalLM OlmoeForCausalLM PaddleOCRVLForConditionalGeneration
    PaliGemmaForConditionalGeneration Phi3ForCausalLM PhiForCausalLM
    QianfanOCRForConditionalGeneration Qwen2AudioForConditionalGeneration Qwen2ForCausalLM
    Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration Qwen2_5OmniForConditionalGeneration
    Qwen2_5_VLForConditionalGeneration Qwen3ASRForConditionalGeneration Qwen3ForCausalLM
    Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3OmniMoeForConditionalGeneration
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
    Qwen4ExpForCausalLM Qwen4ExpForConditionalGeneration SeedOssForCausalLM SmolLM3ForCausalLM
    SmolVLMForConditionalGeneration StableLmForCausalLM Starcoder2ForCausalLM
    Step3p7ForConditionalGeneration VaultGemmaForCausalLM VibeVoiceAsrForConditionalGeneration
    VoxtralForConditionalGeneration Zamba2ForCausalLM
"""
_TURBOMIND = """
    Glm4MoeLiteForCausalLM GptOssForCausalLM InternLM2ForCausalLM
    InternVLForConditionalGeneration LlamaForCausalLM MixtralForCausalLM Qwen2ForCausalLM
    Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration
    Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3_5ForConditionalGeneration
    Qwen3_5MoeForConditionalGeneration
"""

CLASSES: dict[str, frozenset[str]] = {
    VLLM: frozenset(_VLLM.split()),
    LMDEPLOY: frozenset(_TURBOMIND.split()),
}
"""Engine -> its classes. Of an engine that is not here nothing is known."""
