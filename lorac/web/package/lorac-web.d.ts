/** An error with a message for users. */
export class LoracWebError extends Error {}

export interface LoadOptions {
  /** The device that computes; default "auto": WebGPU if the browser supports it, else WebAssembly. */
  backend?: "auto" | "wasm" | "webgpu";
  /** Called with the number of bytes loaded so far, and the total. */
  onProgress?: (progress: { loaded: number; total: number }) => void;
}

export interface Adapter {
  name: string;
  /** The method, such as "lora"; "file" for an adapter from addAdapter(). */
  method: string;
  bytes: number;
  /** Whether its file has been fetched. */
  loaded: boolean;
}

export interface Turn {
  role: string;
  content: string;
}

/** Defaults come from the model's generation_config.json. */
export interface GenerateOptions {
  /** The maximum number of new tokens; default 256. */
  maxNewTokens?: number;
  /** 0 takes the most probable token, and is the default unless the model's configuration samples. */
  temperature?: number;
  /** The number of most probable tokens to sample from; 0 for all. */
  topK?: number;
  /** The cumulative probability of the tokens to sample from. */
  topP?: number;
  repetitionPenalty?: number;
  /** The token ids that end a text; [] for none. */
  eos?: number | number[];
  /** With the same seed the same tokens are drawn. */
  seed?: number;
  /** Ends the text early. */
  signal?: AbortSignal;
}

/** Strengths by adapter name, one adapter's name for strength 1, or null for the base. */
export type Choice = null | string | Record<string, number>;

export interface Model {
  readonly backend: "wasm" | "webgpu";
  /** Whether the model has a chat template, so generate() accepts turns. */
  readonly chats: boolean;
  /** The strengths of the active adapters. */
  readonly choice: Record<string, number>;
  listAdapters(): Adapter[];
  /** Add a file that `lorac swap FOLDER ADAPTERS --out FILE` wrote: .slots.safetensors or .onnx_adapter. */
  addAdapter(name: string, file: ArrayBuffer | Uint8Array): void;
  /** Choose the adapters for later calls; fetch their files on first use. An error leaves the choice unchanged. */
  swap(choice: Choice): Promise<void>;
  /** Choose several adapters, each with a strength t: W + Σ t·(W' − W). */
  mix(strengths: Record<string, number>): Promise<void>;
  encode(text: string): number[];
  decode(ids: number[]): string;
  encodeTurns(turns: Turn[]): number[];
  /** Continue a text, ids or a conversation, token by token; a later swap does not change a running call. */
  generate(prompt: string | number[] | Turn[], options?: GenerateOptions): AsyncGenerator<{ token: number; text: string }>;
  dispose(): Promise<void>;
}

/** Load the folder that `lorac export-web` wrote, from its URL. */
export function load(folder: string | URL, options?: LoadOptions): Promise<Model>;
