/** An error whose message is for users. */
export class LoracWebError extends Error {}

export interface LoadOptions {
  /** Where the model computes; default "auto": by WebGPU where the browser has it, else by WebAssembly. */
  backend?: "auto" | "wasm" | "webgpu";
  /** Receives the bytes that are loaded, and how many there are. */
  onProgress?: (progress: { loaded: number; total: number }) => void;
}

export interface Adapter {
  name: string;
  /** Its method, such as "lora"; "file" of one that was added. */
  method: string;
  bytes: number;
  /** Whether it was fetched. */
  loaded: boolean;
}

export interface Turn {
  role: string;
  content: string;
}

/** Settings that are left out are those of the model's generation_config.json. */
export interface GenerateOptions {
  /** The longest answer; default 256. */
  maxNewTokens?: number;
  /** 0 takes the best token, and is the default unless the model samples. */
  temperature?: number;
  /** The most tokens to sample from; 0 for all. */
  topK?: number;
  /** The share of the probability to sample from. */
  topP?: number;
  repetitionPenalty?: number;
  /** The ids that end a text; [] for none. */
  eos?: number | number[];
  /** The same seed draws the same tokens. */
  seed?: number;
  /** Ends the text early. */
  signal?: AbortSignal;
}

/** Strengths of adapters by name, one name at strength 1, or null for the base. */
export type Choice = null | string | Record<string, number>;

export interface Model {
  readonly backend: "wasm" | "webgpu";
  /** Whether it has a chat template, so that generate() takes turns. */
  readonly chats: boolean;
  /** The strengths of the active adapters. */
  readonly choice: Record<string, number>;
  listAdapters(): Adapter[];
  /** Add a file that `lorac swap FOLDER ADAPTERS --out FILE` wrote: .slots.safetensors or .onnx_adapter. */
  addAdapter(name: string, file: ArrayBuffer | Uint8Array): void;
  /** Choose the adapters of later calls; the file of one that was not used yet is fetched. After an error nothing changed. */
  swap(choice: Choice): Promise<void>;
  /** Choose several adapters, each at its strength: W + Σ t·(W' − W). */
  mix(strengths: Record<string, number>): Promise<void>;
  encode(text: string): number[];
  decode(ids: number[]): string;
  encodeTurns(turns: Turn[]): number[];
  /** Continue a text, ids or a conversation, token by token; a call keeps the adapters that it began with. */
  generate(prompt: string | number[] | Turn[], options?: GenerateOptions): AsyncGenerator<{ token: number; text: string }>;
  dispose(): Promise<void>;
}

/** Load the folder that `lorac export-web` wrote, from its address. */
export function load(folder: string | URL, options?: LoadOptions): Promise<Model>;
